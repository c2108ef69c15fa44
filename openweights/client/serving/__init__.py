"""Models that answer while one works: deployments, and chats with them."""
