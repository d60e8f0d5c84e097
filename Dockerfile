# The environment of `make venv` and the repository in it: docker build -t flux . && docker run -it flux
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make git chromium \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /flux
# The packages first: they change less often than the code.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir fluxlib && touch fluxlib/__init__.py && make venv
COPY . .
RUN touch .venv/.installed
CMD ["make", "reproduce"]
