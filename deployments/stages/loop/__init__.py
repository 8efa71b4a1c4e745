"""One request's denoising loop: scheduler, steps, noise, partial images, and the journal to resume it from."""
