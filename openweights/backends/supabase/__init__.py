"""The store of a team: a Supabase project."""
