"""Starting points that one goes on writing: a vendor's repository, an operator's file."""
