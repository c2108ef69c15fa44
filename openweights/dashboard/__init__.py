"""The page that `ow serve` shows, and the OpenAI-compatible address beside it.

`access.py` says who may ask, `app.py` what can be asked; `job_index.py`, `series.py`, `samples.py`
and `rows.py` turn the store's records into what a page can show; `openai_api.py` speaks as OpenAI's
API does. `static/` is the page itself: plain modules, no build step.
"""
