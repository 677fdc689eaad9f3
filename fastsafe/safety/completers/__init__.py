"""Language models behind one interface, `protocol.Completer`: messages in, text or label odds out.

protocol   `Ask`, `Reply` and `Completer`, which judges, guards and rewriters depend on
settings   settings objects from the mappings of a recipe, checked by pydantic
endpoint   the settings of an OpenAI-compatible endpoint: address, limits, budget
http       the completer over such an endpoint
openai_reply   what such an endpoint sends back, in all its spellings
ledger     its replies and spending, in one SQLite file that outlives a run
"""
