# syntax=docker/dockerfile:1
# Lapse with its applications, in three images (docs/install.md has their use):
#   docker build -t lapse .                       what a node needs, no compiler, not root
#   docker build -t lapse-ssh --target ssh .      the same with ssh and sshd, for `python -m lapse run --hosts`

FROM debian:trixie-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv
WORKDIR /src
COPY . .
ENV LDFLAGS=-Wl,-s PIP_NO_CACHE_DIR=1
RUN python3 -m venv /build && /build/bin/pip wheel --no-deps --wheel-dir /wheels .
RUN python3 -m venv /opt/lapse && /opt/lapse/bin/pip install --only-binary :all: /wheels/*.whl

FROM debian:trixie-slim AS run
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --uid 1000 --create-home --shell /bin/sh lapse
COPY --from=build /opt/lapse /opt/lapse
ENV PATH=/opt/lapse/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1
WORKDIR /home/lapse

FROM run AS ssh
RUN apt-get update && apt-get install --yes --no-install-recommends openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /etc/ssh/ssh_host_*
USER 1000
CMD ["/usr/sbin/sshd", "-D", "-e", "-p", "2222", "-h", "/home/lapse/.ssh/host_key", "-o", "PidFile=none", "-o", "UsePAM=no"]

FROM run
USER 1000
CMD ["python", "-m", "lapse"]
