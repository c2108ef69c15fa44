"""The parts of the store in a Supabase project, put together in `backends/supabase.py`."""
