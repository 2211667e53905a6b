"""What the allocator will reserve beyond what is allocated: its rules, played through on a few steps.

allocator.py     PyTorch's caching allocator
plain.py         a plain loop; stage12.py and stage3.py, DeepSpeed's
gathering.py     which whole weights stage 3 holds, and when, on a stream of its own
run.py           which of these a run is
"""
