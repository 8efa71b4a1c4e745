"""A CUDA device that is pretended, in torch's CPU-only build: tensors of `cuda:0` whose memory is the host's and
whose kernels are the CPU's. What is written for GPUs runs where there is none, and what a GPU would refuse, or get
wrong without a word, is an error.

It shows: tensors of two devices in one operation; host access to device memory; more memory than the card, or the
process's cap, has; a stream that uses what another writes and was not told to wait; memory that is used again
while another stream may be at work on it; a host buffer that is read before its copy is done, or changed under it;
what happens when a GPU is lost. It cannot show: speed, real kernels and their rounding, cuBLAS, cuDNN, Triton,
inductor, CUDA graphs, NCCL's own behaviour, lazy loading of kernels, fp8 arithmetic, bitsandbytes' CUDA kernels,
processes that fill one card together, nor that CUDA has a kernel at all.

Read native/module.cpp and what it includes, install.py, preload/, build.py; then collect.py, items.py, inner.py.
"""
