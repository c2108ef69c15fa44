"""Conversations as chat templates write them, compared with what they say."""
