"""A simulated CUDA device in torch's CPU-only build: `cuda:0` is the host's memory and the CPU's kernels.

Mistakes that a GPU would refuse, or silently compute wrong results from, are errors: tensors of two devices in one
operation; host access to device memory; more memory than the card or a cap has; a stream that does not wait;
memory used again too early; a host buffer read before its copy is done; a lost GPU.

It cannot show: speed, real kernels and their rounding, cuBLAS, cuDNN, Triton, inductor, CUDA graphs, NCCL's own
behaviour, lazy loading of kernels, fp8 arithmetic, bitsandbytes' CUDA kernels, processes that fill one card
together, nor that CUDA has a kernel at all.

Read native/module.cpp and what it includes, install.py, preload/, build.py; then collect.py, items.py, inner.py.
"""
