"""A server of pictures in the form of OpenAI's images API, over the serving engine."""
