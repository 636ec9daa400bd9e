package dagger

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// What serves thousands of engines within a round of 30 s.
const (
	// ReadTimeout is how long one engine may take: a healthy one answers in
	// milliseconds, one on a node with all CPUs busy in a second or two.
	ReadTimeout = 5 * time.Second
	// ReadParallel is how many engines are read at once: so many that 200 that
	// hang for the first time leave room for the rest, and no more than fit in
	// some 50 MiB.
	ReadParallel = 512
)

// Target is one engine to read.
type Target struct {
	Node model.NodeName
	Pod  string // namespace/name
	// Addr is the pod's own address with the port of its metrics. It is an
	// address and no URL, so that whatever a pod says of itself, nothing but
	// GET /metrics is sent, and no name is looked up.
	Addr netip.AddrPort
	// Version to put into the reading: the metrics do not have it.
	Version string
}

// Scraper reads engines over HTTP. It follows no redirect, uses no proxy, and
// bounds what it reads of each engine. A Scraper is for one goroutine.
type Scraper struct {
	timeout  time.Duration
	parallel int
	now      func() time.Time
	client   http.Client
	// hung says when an engine that let its last reader wait in vain was asked.
	hung map[netip.AddrPort]time.Time
}

// NewScraper returns a Scraper that waits for one engine as long as timeout and
// reads as many as parallel at once, usually [ReadTimeout] and [ReadParallel].
func NewScraper(timeout time.Duration, parallel int, now func() time.Time) (*Scraper, error) {
	if timeout <= 0 || parallel <= 0 || now == nil {
		return nil, fmt.Errorf("making a scraper: timeout %v and parallel %d must be positive, and there must be a clock", timeout, parallel)
	}
	return &Scraper{
		timeout: timeout, parallel: parallel, now: now,
		client: http.Client{
			Transport: &http.Transport{
				DialContext:            (&net.Dialer{}).DialContext,
				DisableCompression:     true, // else a small answer could become a huge one
				MaxIdleConns:           parallel,
				MaxIdleConnsPerHost:    1,
				IdleConnTimeout:        90 * time.Second,
				MaxResponseHeaderBytes: 16 << 10,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close ends the connections that are kept for the next round.
func (s *Scraper) Close() { s.client.CloseIdleConnections() }

// Read reads every target once and tells deliver of each as soon as it is known,
// one at a time, before Read returns. What could not be read, or not before ctx
// ended, is unknown with a reason. A round over all engines ends in time when ctx
// has a deadline.
//
// Engines that hung when they were read last come after all others, the one that
// has waited longest first, so that however many they are they only delay each
// other. Those that hang for the first time delay nobody unless they are more
// than are read at once.
func (s *Scraper) Read(ctx context.Context, targets []Target, deliver func(model.EngineReading)) {
	order := slices.Clone(targets)
	slices.SortStableFunc(order, func(a, b Target) int { return s.hung[a.Addr].Compare(s.hung[b.Addr]) })

	type result struct {
		addr    netip.AddrPort
		reading model.EngineReading
		hung    bool
	}
	var begun atomic.Int64
	results := make(chan result)
	var readers sync.WaitGroup
	defer readers.Wait()
	for range min(s.parallel, len(order)) {
		readers.Go(func() {
			for i := begun.Add(1) - 1; i < int64(len(order)); i = begun.Add(1) - 1 {
				reading, hung := s.read(ctx, order[i])
				results <- result{order[i].Addr, reading, hung}
			}
		})
	}
	hung := map[netip.AddrPort]time.Time{}
	for range order {
		r := <-results
		if r.hung {
			hung[r.addr] = r.reading.At
		} else if was, ok := s.hung[r.addr]; ok && ctx.Err() != nil && r.reading.Unknown != "" {
			hung[r.addr] = was // its turn did not come
		}
		deliver(r.reading)
	}
	s.hung = hung
}

// read reads one engine, and says whether it let us wait in vain.
func (s *Scraper) read(ctx context.Context, t Target) (reading model.EngineReading, hung bool) {
	reading = model.EngineReading{Node: t.Node, Pod: t.Pod, At: s.now(), CacheBytes: -1}
	if ctx.Err() != nil {
		reading.Unknown = "not read: there was no time left"
		return reading, false
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	clients, bytes, err := s.get(ctx, t.Addr)
	switch {
	case err == nil:
		reading.Clients, reading.CacheBytes, reading.Version = clients, bytes, t.Version
	case ctx.Err() != nil:
		reading.Unknown = "no answer in time"
		hung = true
	default:
		reading.Unknown = sentence(err)
	}
	return reading, hung
}

func (s *Scraper) get(ctx context.Context, addr netip.AddrPort) (clients int, cacheBytes int64, err error) {
	where := url.URL{Scheme: "http", Host: addr.String(), Path: "/metrics"}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where.String(), nil)
	if err != nil {
		return 0, 0, err
	}
	req.Header.Set("Accept", "text/plain;version=0.0.4")
	req.Header.Set("User-Agent", "hearth")
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, 0, fmt.Errorf("it answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	return Parse(resp.Body)
}

// sentence says what went wrong in few words. They can contain what the engine
// sent, so they are bounded.
func sentence(err error) string {
	const most = 200
	if request := (*url.Error)(nil); errors.As(err, &request) {
		err = request.Err // without the URL, which the node and pod tell
	}
	text := err.Error()
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}
