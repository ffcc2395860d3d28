"""The CUDA kernels compiled by g++ and run by an emulator of the CUDA execution model: see driver.py."""
