"""PyTorch modules as JAX functions: traced by torch.export, run by a table of operations.

trace.py asks torch for the functional graph of a module, with no weights in memory; graph.py makes of it a Program,
plain data without torch; program.py runs that; `operations` has a JAX function for every operation. torch is imported
here alone, when a module is traced.
"""
