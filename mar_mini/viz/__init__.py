"""Pictures of what the model does. They look at the model; the model never looks at them."""
