"""What a student learns from: prompts, images, stored ODE pairs and the bundled sets."""
