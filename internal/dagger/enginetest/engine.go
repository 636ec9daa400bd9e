package enginetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// envConfig makes this binary an engine; it holds its Config.
const envConfig = "HEARTH_TEST_ENGINE"

// Main runs an engine and exits when this process was started as one, and returns
// at once otherwise. It is called first in TestMain.
func Main() {
	text, ok := os.LookupEnv(envConfig)
	if !ok {
		return
	}
	var cfg Config
	err := json.Unmarshal([]byte(text), &cfg)
	if err == nil {
		err = run(cfg, os.Stdin, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// job is what a client asks for; without a key it is a probe, which is a client
// all the same. answer is what it is told.
type (
	job struct {
		Key   string
		Bytes int64
	}
	answer struct{ Warm bool }
)

// addresses is what an engine says once it is ready.
type addresses struct{ API, Metrics string }

type engine struct {
	store    store
	running  sync.WaitGroup // the connections of clients, and what accepts them
	mu       sync.Mutex
	sessions int
	stopping bool
}

// run is the engine's life, from its start to the end of a clean stop.
func run(cfg Config, parent io.Reader, out io.Writer) error {
	go func() { // nobody is left to stop it
		_, _ = io.Copy(io.Discard, parent)
		os.Exit(3)
	}()
	stop, release := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer release()

	s, err := open(cfg.Dir)
	if err != nil {
		return err
	}
	e := &engine{store: s}
	api, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	if err != nil {
		return fmt.Errorf("listening for clients: %w", err)
	}
	metrics, err := net.Listen("tcp", cfg.MetricsAddr) //nolint:noctx // returns at once
	if err != nil {
		return fmt.Errorf("listening for metrics: %w", err)
	}
	server := &http.Server{Handler: e.metrics(stop, cfg.Refresh), ReadHeaderTimeout: 30 * time.Second}
	go func() { _ = server.Serve(metrics) }() // to the very end
	e.running.Go(func() { e.accept(api) })
	if err := json.NewEncoder(out).Encode(addresses{api.Addr().String(), metrics.Addr().String()}); err != nil {
		return fmt.Errorf("telling that it is ready: %w", err)
	}

	<-stop.Done()
	e.mu.Lock()
	e.stopping = true
	e.mu.Unlock()
	api.Close()
	e.running.Wait()
	return e.store.close()
}

func (e *engine) accept(api net.Listener) {
	for {
		conn, err := api.Accept()
		if err != nil {
			return // closed
		}
		e.running.Go(func() {
			defer conn.Close()
			e.serve(conn)
		})
	}
}

// serve holds a session until its client leaves.
func (e *engine) serve(conn net.Conn) {
	var j job
	if json.NewDecoder(conn).Decode(&j) != nil || !e.enter() {
		return
	}
	defer e.leave()
	var a answer
	if j.Key != "" {
		warm, err := e.store.use(j.Key, j.Bytes)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		a.Warm = warm
	}
	if json.NewEncoder(conn).Encode(a) == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
}

func (e *engine) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return false
	}
	e.sessions++
	return true
}

func (e *engine) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sessions--
}

// clients are those with a session; a stop ends the sessions before the clients
// have left.
func (e *engine) clients() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return 0
	}
	return e.sessions
}

// metrics serves what a real engine serves. The cache is counted now and then,
// until stop.
func (e *engine) metrics(stop context.Context, every time.Duration) http.Handler {
	registry := prometheus.NewRegistry()
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		registry.MustRegister(g)
		return g
	}
	clients := gauge("dagger_connected_clients", "Number of currently connected clients")
	calls := gauge("dagger_dagql_cache_entries", "Number of entries in the dagql cache")
	gauge("dagger_local_cache_corrupt_db_reset", "If set, the local cache database was found to be corrupt and reset")
	entries := gauge("dagger_local_cache_entries", "Number of entries in the local cache")
	bytes := gauge("dagger_local_cache_total_disk_size_bytes", "Total disk space consumed by the local cache in bytes")
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	go func() {
		ticks := time.NewTicker(every)
		defer ticks.Stop()
		for {
			if n, size, err := e.store.count(); err == nil {
				entries.Set(float64(n))
				bytes.Set(float64(size))
			}
			select {
			case <-ticks.C:
			case <-stop.Done():
				return
			}
		}
	}()

	handler := promhttp.InstrumentMetricHandler(registry, promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, r *http.Request) {
		clients.Set(float64(e.clients()))
		if n, _, err := e.store.count(); err == nil {
			calls.Set(float64(n))
		}
		handler.ServeHTTP(w, r)
	})
	return mux
}

// store is a data folder in use.
type store struct {
	dir  string
	lock *os.File
}

// open takes a data folder, and erases its cache when it was not closed.
func open(dir string) (store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return store{}, fmt.Errorf("making the data folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return store{}, fmt.Errorf("opening the lock: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return store{}, fmt.Errorf("locking %s, which another engine may use: %w", dir, err)
	}
	s := store{dir: dir, lock: lock}
	mark, err := os.ReadFile(s.mark())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return store{}, fmt.Errorf("reading whether the last stop was clean: %w", err)
	}
	if err == nil && string(mark) != "1" {
		if err := Wipe(dir); err != nil {
			return store{}, err
		}
	}
	if err := os.MkdirAll(cacheOf(dir), 0o700); err != nil {
		return store{}, fmt.Errorf("making the cache: %w", err)
	}
	return s, s.setMark("0")
}

func (s store) mark() string { return filepath.Join(s.dir, "clean") }

// setMark replaces the mark in one step: it is never read half written.
func (s store) setMark(mark string) error {
	if err := os.WriteFile(s.mark()+".new", []byte(mark), 0o600); err != nil {
		return fmt.Errorf("marking the data: %w", err)
	}
	if err := os.Rename(s.mark()+".new", s.mark()); err != nil {
		return fmt.Errorf("marking the data: %w", err)
	}
	return nil
}

// close is the end of a clean stop.
func (s store) close() error {
	defer s.lock.Close()
	return s.setMark("1")
}
