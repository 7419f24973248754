"""What people see of a model or a run: errors, pictures, a page, progress."""
