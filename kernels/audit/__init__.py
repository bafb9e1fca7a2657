"""Judging the Triton kernels with no GPU: the bytes that they move, and the machine code that they become.

``python -m braze.kernels.audit traffic`` and ``… code`` audit every operator and print a JSON record a line;
``python -m braze.benchmarks kernels`` runs both and shows a table. They are two processes because Triton decides when
it is imported whether a kernel is interpreted or compiled.
"""
