# Thin names over cargo and the scripts in deploy/; each of them can be called by itself.

CARGO   ?= cargo
PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONF ?= /etc
UNITDIR ?= $(if $(filter /usr,$(PREFIX)),/usr/lib/systemd/system,/etc/systemd/system)
IMAGE   ?= tiny
BUILD   := build
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release
# For this target alone the flags below reach the program and not the build's own tools.
GUEST_TARGET := x86_64-unknown-linux-gnu
GUEST   := $(or $(CARGO_TARGET_DIR),target)/$(GUEST_TARGET)/guest

.DEFAULT_GOAL := help
.PHONY: help deps cargo-there build guest hostile guest-packages images demo demo-fleet demo-replicas test lint fuzz proto bench install uninstall clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## what building needs, from Debian's packages (root)
	@deploy/host-setup.sh --build-deps
	@$(MAKE) --no-print-directory cargo-there

# Debian 12's own Rust is too old; nothing is downloaded from anywhere behind anyone's back.
cargo-there:
	@command -v $(CARGO) >/dev/null || { \
	  want=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml); \
	  echo "make: cargo is missing: install Rust $$want or newer with rustup (https://rustup.rs) and put its bin folder on the PATH" >&2; \
	  echo "make: under sudo the PATH may lack it: sudo env PATH=\"\$$PATH\" make ..." >&2; \
	  exit 1; }

build: cargo-there guest ## release binaries
	$(CARGO) build --release --workspace --exclude ghost-guest --bins --locked
	@# Where the host agent looks first.
	install -m 0755 $(BUILD)/guest/ghost-guest $(RELEASE)/ghost-guest

guest: cargo-there ## the agent inside VMs: one static program, under build/guest/
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --profile guest --target $(GUEST_TARGET) -p ghost-guest --locked
	install -D -m 0755 $(GUEST)/ghost-guest $(BUILD)/guest/ghost-guest

# Takes the agent's place in guests under test.
hostile: cargo-there
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --profile guest --target $(GUEST_TARGET) -p ghost-hostile --locked
	install -D -m 0755 $(GUEST)/hostile-guest $(BUILD)/guest/hostile-guest

guest-packages: guest ## the same as .deb and .rpm (needs cargo-deb and cargo-generate-rpm)
	@for tool in cargo-deb cargo-generate-rpm; do command -v $$tool >/dev/null || { \
	  echo "make: $$tool is missing: cargo install --locked cargo-deb cargo-generate-rpm" >&2; exit 1; }; done
	cd guest && $(CARGO) deb --no-build --no-strip --output $(CURDIR)/$(BUILD)/guest/
	$(CARGO) generate-rpm -p guest --output $(BUILD)/guest/
	@ls -l $(BUILD)/guest/

images: ## both guest images, under build/images/ (root)
	deploy/images/build-tiny.sh $(BUILD)/images/tiny.qcow2
	deploy/images/build-debian-12.sh $(BUILD)/images/debian-12.qcow2

demo: ## sets this host up and shows one VM's life (root; IMAGE=tiny or debian-12)
	@IMAGE=$(IMAGE) deploy/demo.sh

demo-fleet: ## a Core and two hosts that join it, on this machine (root)
	@deploy/demo-fleet.sh

demo-replicas: ## two replicas of Core over three members of etcd, one of each killed
	@deploy/replicas.sh

test: ## sets this host up and runs every tier (root)
	@deploy/test.sh

lint: cargo-there ## formatting, clippy, shell scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if command -v shellcheck >/dev/null; then \
	  shellcheck -x -P SCRIPTDIR deploy/*.sh deploy/images/*.sh deploy/guest/*.sh deploy/packages/*.sh .ci/run && \
	  shellcheck -s dash deploy/packages/deb/* deploy/packages/rpm/* deploy/packages/ghost-guest.sysv $$(grep -l "^#!/bin/sh" deploy/images/tiny/*); \
	else echo "lint: shell scripts skipped (shellcheck is not installed)"; fi

fuzz: cargo-there ## libFuzzer on what guests and hosts send, FUZZ_SECONDS each (needs cargo-fuzz)
	@deploy/fuzz.sh

proto: cargo-there ## generated protobuf code anew, from proto/
	GHOST_PROTO_WRITE=1 $(CARGO) test -p ghost-proto --test generate

bench: build hostile ## the figures that the README quotes (root)
	$(RELEASE)/bench
	@# A hundred simulated guests: the links' own share, which needs no libvirt.
	$(CARGO) test --release --locked -p ghost-infrastructure --test it -- --ignored --exact --nocapture guest_link::measure::a_hundred_guests

install: build ## binaries, unit, configuration, completions and manuals
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSCONF)/ghost
	install -m 0755 $(RELEASE)/ghost-agent $(RELEASE)/ghost-core $(RELEASE)/ghostctl $(DESTDIR)$(PREFIX)/bin/
	install -D -m 0755 $(BUILD)/guest/ghost-guest $(DESTDIR)$(PREFIX)/lib/ghost/ghost-guest
	@set -e; for unit in ghost-agent ghost-core; do \
	  sed 's|/usr/local/bin|$(PREFIX)/bin|' deploy/systemd/$$unit.service >$(DESTDIR)$(UNITDIR)/$$unit.service; \
	  chmod 0644 $(DESTDIR)$(UNITDIR)/$$unit.service; done
	@# An owner's configuration is never overwritten.
	@if [ -f configs/agent.yaml ] && [ ! -e $(DESTDIR)$(SYSCONF)/ghost/agent.yaml ]; then \
	  install -m 0640 configs/agent.yaml $(DESTDIR)$(SYSCONF)/ghost/agent.yaml; \
	  echo "install: wrote $(DESTDIR)$(SYSCONF)/ghost/agent.yaml"; fi
	@if [ -f configs/core.yaml ] && [ ! -e $(DESTDIR)$(SYSCONF)/ghost/core.yaml ]; then \
	  install -m 0640 configs/core.yaml $(DESTDIR)$(SYSCONF)/ghost/core.yaml; \
	  echo "install: wrote $(DESTDIR)$(SYSCONF)/ghost/core.yaml"; fi
	@if [ -f configs/images.yaml ] && [ ! -e $(DESTDIR)$(SYSCONF)/ghost/images.yaml ]; then \
	  install -m 0644 configs/images.yaml $(DESTDIR)$(SYSCONF)/ghost/images.yaml; fi
	@set -e; share=$(DESTDIR)$(PREFIX)/share; out=$$(mktemp); trap 'rm -f "$$out"' EXIT; \
	for row in bash:bash-completion/completions/ghostctl zsh:zsh/site-functions/_ghostctl fish:fish/vendor_completions.d/ghostctl.fish; do \
	  if $(RELEASE)/ghostctl completion $${row%%:*} >"$$out" 2>/dev/null && [ -s "$$out" ]; then \
	    install -D -m 0644 "$$out" "$$share/$${row#*:}"; fi; done; \
	if $(RELEASE)/ghostctl man >"$$out" 2>/dev/null && [ -s "$$out" ]; then \
	  install -D -m 0644 "$$out" "$$share/man/man1/ghostctl.1"; fi
	@echo "install: next: deploy/host-setup.sh --runtime, then systemctl daemon-reload && systemctl enable --now ghost-agent"

uninstall: ## what install wrote; configuration and state stay
	rm -f $(DESTDIR)$(PREFIX)/bin/ghost-agent $(DESTDIR)$(PREFIX)/bin/ghost-core $(DESTDIR)$(PREFIX)/bin/ghostctl \
	  $(DESTDIR)$(UNITDIR)/ghost-agent.service $(DESTDIR)$(UNITDIR)/ghost-core.service
	rm -f $(DESTDIR)$(PREFIX)/lib/ghost/ghost-guest
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/ghostctl $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_ghostctl \
	  $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ghostctl.fish $(DESTDIR)$(PREFIX)/share/man/man1/ghostctl.1

clean: ## everything built here
	$(CARGO) clean
	rm -rf $(BUILD)
