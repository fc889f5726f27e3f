"""What is learned from: pictures, and the views made of them."""
