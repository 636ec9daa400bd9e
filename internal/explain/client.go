package explain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"
)

const (
	// maxBody is more than the report of any fleet takes.
	maxBody = 64 << 20
	// answerWithin bounds the whole request: reports come from memory.
	answerWithin = 20 * time.Second
)

// ErrAddress says that an address cannot be one of Hearth's HTTP server.
var ErrAddress = errors.New("want an address such as http://127.0.0.1:8087")

// Fetch asks the provider whose HTTP server is at that address for its report.
func Fetch(ctx context.Context, address string) (*Report, error) {
	if !strings.Contains(address, "://") {
		address = "http://" + address
	}
	base, err := url.Parse(address)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("%w, not %q", ErrAddress, address)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath("api/v1/nodegroups").String(), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAddress, err)
	}
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}}
	response, err := client.Do(request)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("nothing listens at %s; for a provider in a cluster run this first: "+
			"kubectl -n hearth port-forward deploy/hearth 8087", base)
	}
	if err != nil {
		return nil, fmt.Errorf("asking the provider: %w", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("asking the provider at %s: %w", base, err)
	case len(body) > maxBody:
		return nil, fmt.Errorf("asking the provider at %s: the answer is longer than %d MiB", base, maxBody>>20)
	}
	if response.StatusCode != http.StatusOK {
		var p problem
		if json.Unmarshal(body, &p) != nil || p.Error == "" {
			p.Error = "it does not speak Hearth's API"
		}
		return nil, fmt.Errorf("%s answered %s: %s", base, clean(response.Status), clean(cut(p.Error, 500)))
	}
	var r Report
	if err := json.Unmarshal(body, &r); err != nil || r.At.IsZero() {
		return nil, fmt.Errorf("%s does not speak Hearth's API: its answer is no report", base)
	}
	return &r, nil
}
