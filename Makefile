# The tasks of people who work on tailnode or install it; cargo builds it.
.DEFAULT_GOAL := help
.PHONY: help build manual demo test units namespaces engines matrix interop bench check install uninstall

# Finds cargo although sudo resets PATH, and leaves no files of root's in the tree.
cargo := integration/cargo
tools := target/tools
# What "make bench" measures; dev is for work on the bench itself.
PROFILE := release
# What the tests build networks with.
networks := integration/need ip:iproute2 tc:iproute2 nft:nftables sysctl:procps faketime:faketime

help: ## show this
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' Makefile | column -t -s '|'

build: ## compile the programs for release
	$(cargo) build --release --workspace --bins

manual: ## write the README's table of options and the manual page
	TAILNODE_WRITE_MANUAL=1 $(cargo) test -p tailnode-plugin --lib manual::

demo: ## (root) see it work: two containers, two engines, one tailnet
	@integration/demo

test: ## (root) all tests: units, network namespaces, peers, Podman and Docker in a lab
	@[ "$$(id -u)" = 0 ] || { echo "make test: run me as root (sudo make test); 'cargo test' runs what needs no root" >&2; exit 1; }
	@$(MAKE) --no-print-directory --keep-going units namespaces interop engines

units:
	$(cargo) test --no-fail-fast --workspace

namespaces:
	@$(networks)
	@# Built as the tree's owner, run as root.
	@set -e; $(cargo) build --workspace --bins; failed=; \
	for test in $$($(cargo) test -p tailnode-tests --no-run --message-format=json | sed -nE 's/.*"executable":"([^"]+)".*/\1/p'); do \
		echo "$$test --ignored"; (cd tests && "$$test" --ignored --test-threads 1) || failed=yes; \
	done; [ ! "$$failed" ]

engines:
	integration/engines

matrix: ## (root) demo and engine tests on Debians old and new; SUITES=sid RUNTIMES=runc CASES=… choose
	@integration/matrix

interop: ## (root) our nodes with the programs of others: Tailscale's client and test server, Headscale
	@[ "$$(id -u)" = 0 ] || { echo "make interop: run me as root (sudo make interop)" >&2; exit 1; }
	@$(networks) faketime:faketime
	@integration/peers/build >/dev/null
	@set -e; $(cargo) build --workspace --bins; \
	test=$$($(cargo) test -p tailnode-tests --test interop --no-run --message-format=json | sed -nE 's/.*"executable":"([^"]+)".*/\1/p'); \
	"$$test" $(CASES) 2>target/interop.log || { echo "make interop: target/interop.log says more" >&2; exit 1; }

bench: ## (root) our node measured beside Tailscale's, each in its turn; QUICK=1 takes minutes, not hours
	@[ "$$(id -u)" = 0 ] || { echo "make bench: run me as root (sudo make bench)" >&2; exit 1; }
	@$(networks)
	@integration/peers/build >/dev/null
	@integration/peers/build bench >/dev/null
	@# All at once: apart, they would want their dependencies with other features.
	@set -e; race=$$($(cargo) build --profile $(PROFILE) --workspace --bins --bench race --message-format=json | sed -nE 's/.*"kind":\["bench"\].*"executable":"([^"]+)".*/\1/p'); \
	"$$race" 2>target/bench.log || { echo "make bench: target/bench.log says more" >&2; exit 1; }; \
	"$$race" plot target/bench.json target/bench.svg

check: $(tools)/bin/cargo-deny $(tools)/bin/cargo-machete ## format, lints, licences and advisories, unused dependencies, scripts
	$(cargo) fmt --all --check
	$(cargo) clippy --workspace --all-targets -- -D warnings
	$(cargo) clippy -p tailnode-tests --test interop -- -D warnings
	$(cargo) machete
	@if $(cargo) deny fetch db 2>/dev/null; then \
		$(cargo) deny --log-level error check; \
	else \
		echo "make check: the advisory database cannot be reached: advisories are NOT checked" >&2; \
		$(cargo) deny --log-level error check bans licenses sources; \
	fi
	shellcheck --external-sources integration/need integration/lab integration/cargo integration/demo integration/engines integration/matrix integration/cannot integration/bench integration/bench-hook integration/cases/* integration/peers/build packaging/install .ci/run

$(tools)/bin/cargo-deny:
	$(cargo) install --quiet --locked --debug --root $(tools) cargo-deny@0.20.2

$(tools)/bin/cargo-machete:
	$(cargo) install --quiet --locked --debug --root $(tools) cargo-machete@0.9.2

install: build ## (root) install on this host and start tailnoded
	@packaging/install

uninstall: ## (root) remove the programs; keeps /etc/tailnode and /var/lib/tailnode
	@packaging/install --remove
