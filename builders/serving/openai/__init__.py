"""OpenAI's HTTP protocol over an engine: what `smoothquant serve` runs.

requests       bodies of requests -> what is asked, or the error
chat_template  messages -> the text of a prompt
choice         a job's events -> pieces of text, up to a stop string
answering      a request's jobs, from their submission to their last event
answers        pieces -> JSON
service        the engine, its scheduler and its tokenizer
app            routes, keys, limits
run            sockets and signals
"""
