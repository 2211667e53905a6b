"""What users construct: one class for each rule, and the registry that knows them by name."""
