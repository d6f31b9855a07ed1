"""Other libraries' models and trainers on our kernels; each module here needs its library, and is imported by name."""
