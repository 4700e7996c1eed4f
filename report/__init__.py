"""Pictures of a quantisation: figures and the pages that show them."""
