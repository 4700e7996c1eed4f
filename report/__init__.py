"""Pictures of a quantisation: figures and the page that shows them."""
