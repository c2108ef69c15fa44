"""What every job needs of a model: loading it, rendering conversations, its tokens, its forward."""
