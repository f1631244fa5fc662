"""Images, masks and the manifest."""
