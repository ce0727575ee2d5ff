"""What can be asked: one module for each kind of question, all over one `Runtime`."""
