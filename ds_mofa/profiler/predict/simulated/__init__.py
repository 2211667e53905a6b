"""One micro-batch of a model under fake tensors, which have shapes and no data.

micro_batch.py   its run, and what was alive when
model.py         the model that transformers would build; optimizer.py, what an optimizer attaches to it
liger.py         stand-ins for liger-kernel's operators
"""
