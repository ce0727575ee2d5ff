"""What crosses the network: OpenAI's requests, responses and errors, and brim's additions."""
