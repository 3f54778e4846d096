"""The step loop, the request table and the model runner."""
