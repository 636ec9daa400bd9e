# Everything here works from a fresh clone with Go, a C compiler (for the race
# detector), git and make. Tools are pinned in tools/, the control plane in
# test/cluster; both are built from Go modules when first needed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 10s
MINUTES ?= 30
SEEDS ?= 100
START ?= 1
VULNDB ?= https://vuln.go.dev
# The path of a real cluster-autoscaler makes e2e run against it too.
export CLUSTER_AUTOSCALER := $(abspath $(CLUSTER_AUTOSCALER))

BUF := go tool -modfile=tools/buf/go.mod buf
CONTROLLER_GEN := go tool -modfile=tools/go.mod controller-gen
GOLANGCI_LINT := go tool -modfile=tools/lint/go.mod golangci-lint
GOVULNCHECK := go tool -modfile=tools/go.mod govulncheck

# Packages whose tests start a control plane; all others are unit tests.
WITH_CLUSTER := /internal/localcluster$$|/test(/|$$)
unit_packages = packages=$$(go list ./... | grep -vE '$(WITH_CLUSTER)')
e2e_packages = packages=$$(go list ./... | grep -E '$(WITH_CLUSTER)' | grep -v /test/observe$$)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.PHONY: build
build: ## Build bin/hearth
	go build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/hearth ./cmd/provider

.PHONY: image
image: ## Build the container image as an OCI archive, bin/hearth-image.tar
	go build -C tools/image -o ../../bin/image .
	bin/image -version '$(VERSION)' -out bin/hearth-image.tar

.PHONY: cluster
cluster: ## Build the control plane that tests and demo start (once, about 5 minutes)
	test/cluster/build

.PHONY: demo
demo: cluster build ## Watch the whole loop on this machine
	bin/hearth demo

.PHONY: generate
generate: ## Generate Go from the protos, CRDs from the API types, reference pages from the code
	@mkdir -p bin
	$(BUF) generate protos --template protos/buf.gen.yaml
	$(CONTROLLER_GEN) object crd paths=./api/... output:crd:artifacts:config=deploy/crds
	go test ./cmd/provider -run TestReference -count=1 -update
	go -C tools run ./dashboards > bin/dashboard.json
	mv bin/dashboard.json charts/hearth/files/dashboards/hearth.json
	go test ./charts -run 'TestChartCarriesDeploy|TestReadme' -count=1 -update

.PHONY: prices
prices: ## Renew the list of AWS's prices, from the release that tools/prices pins
	mkdir -p bin
	go -C tools run ./prices > bin/prices.csv
	mv bin/prices.csv internal/aws/prices.csv

.PHONY: policy
policy: ## Rewrite the tables of docs/policy.md (HEARTH_TRACES=folder of the traces)
	@for trace in bitcoin-core-ci multi-repo-gha; do \
		[ -n '$(HEARTH_TRACES)' ] && [ -f '$(HEARTH_TRACES)'/$$trace/jobs.csv.gz ] || { \
			echo "policy: HEARTH_TRACES='$(HEARTH_TRACES)' has no $$trace/jobs.csv.gz; want HEARTH_TRACES=FOLDER make policy" >&2; exit 1; }; \
	done
	HEARTH_TRACES='$(abspath $(HEARTH_TRACES))' go test ./cmd/provider -run '^TestPolicy$$' -count=1 -update

.PHONY: verify
verify: ## Fail if anything generated is stale, a module untidy or the linters complain
	@fingerprint() { \
		git ls-files --cached --others --exclude-standard --deduplicate -z | LC_ALL=C sort -z | \
			while IFS= read -r -d '' file; do [ ! -f "$$file" ] || sha256sum "$$file"; done; \
	}; \
	before=$$(fingerprint); \
	$(MAKE) --no-print-directory generate; \
	after=$$(fingerprint); \
	diff <(echo "$$before") <(echo "$$after") || { echo 'verify: the files above were stale; they are generated anew now' >&2; exit 1; }
	$(BUF) lint protos
	$(BUF) format --diff --exit-code protos
	@for mod in go.mod tools/go.mod tools/buf/go.mod tools/helm/go.mod tools/image/go.mod tools/lint/go.mod test/cluster/go.mod; do \
		echo "go mod tidy -diff ($$mod)"; \
		go -C "$$(dirname "$$mod")" mod tidy -diff || { echo "verify: $$mod is not tidy" >&2; exit 1; }; \
	done
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo 'verify: not formatted by gofmt:' $$unformatted >&2; exit 1; }
	go vet ./...
	$(MAKE) --no-print-directory lint

.PHONY: lint
lint: ## Run the linters
	$(GOLANGCI_LINT) run

.PHONY: vuln
vuln: ## Look for known vulnerabilities (asks VULNDB, the Go vulnerability database)
	@$(GOVULNCHECK) -db '$(VULNDB)' ./... || { code=$$?; \
		[ $$code -eq 3 ] || echo 'vuln: nothing was checked: it needs $(VULNDB), or VULNDB=URL of a copy' >&2; \
		exit $$code; }

.PHONY: sbom
sbom: build ## Write what is in bin/hearth as CycloneDX, bin/hearth.cdx.json
	go -C tools run ./sbom ../bin/hearth > bin/hearth.cdx.json

.PHONY: reproducible
reproducible: ## Build twice in different folders and compare (from nothing: minutes)
	tools/reproducible

.PHONY: mutants
mutants: ## Put deliberate defects in, one at a time: a test must notice each (half an hour)
	go run ./test/mutants

.PHONY: unit
unit: ## Run the fast tests, without a control plane
	@$(unit_packages); go test -short -timeout 5m $$packages

.PHONY: race
race: ## Run the same tests at full length under the race detector
	@$(unit_packages); go test -race -timeout 15m $$packages
	go test -C tools/image .
	go test -C tools ./sbom ./prices

.PHONY: e2e
e2e: cluster build ## Run the tests that start a control plane (and CLUSTER_AUTOSCALER, if set)
	@$(e2e_packages); go test -count=1 -parallel 4 -timeout 20m $$packages

.PHONY: observe
observe: cluster ## Look at dashboards, alerts and status page by Prometheus and Chromium (which it needs)
	@for program in prometheus promtool chromium; do command -v $$program >/dev/null || { \
		echo "observe: $$program is not there: install your system's packages prometheus and chromium" >&2; exit 1; }; done
	go test -count=1 -timeout 10m ./test/observe

.PHONY: test
test: ## Run all tests, as CI does
	$(MAKE) --no-print-directory race
	$(MAKE) --no-print-directory e2e

.PHONY: scale
scale: cluster build ## 300 groups, 5,000 nodes, 20,000 jobs an hour, for MINUTES (30)
	go run ./test/scale -for '$(MINUTES)m'

.PHONY: chaos
chaos: ## Whole days with everything going wrong, in virtual time: SEEDS (100) of them from START (1) on
	HEARTH_CHAOS_SEEDS='$(SEEDS)' HEARTH_CHAOS_START='$(START)' go test ./internal/controller -run '^TestChaos' -count=1 -timeout 10h

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (10s)
	tools/fuzz $(FUZZTIME)

.PHONY: bench
bench: ## Run every benchmark
	@$(unit_packages); go test -run '^$$' -bench . -benchmem -timeout 30m $$packages

.PHONY: clean
clean: ## Remove everything that make has built
	rm -rf bin .cache
