"""What is learned from: images, and the views made of them."""
