"""What makes it faster: each is passed in, and the model without it is the slow and right one."""
