"""The fine-tuning command: ``deepspeed launch/train.py ...`` and the modules it is made of."""
