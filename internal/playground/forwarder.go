package playground

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// Forwarder is a TCP forwarder on loopback: new connections go to the address
// that Target names at that moment, as a Service leads to the leader. Its
// methods are safe for concurrent use.
type Forwarder struct {
	listener net.Listener
	target   func() string
	wg       sync.WaitGroup

	mu    sync.Mutex
	pairs map[*pair]bool
}

type pair struct {
	client, server net.Conn
	silent         chan struct{} // closed: nothing is forwarded any more
}

// NewForwarder listens on a free port. Connections are refused while target
// returns an empty address.
func NewForwarder(target func() string) (*Forwarder, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening the forwarder's port: %w", err)
	}
	f := &Forwarder{listener: l, target: target, pairs: map[*pair]bool{}}
	f.wg.Go(f.accept)
	return f, nil
}

// Address is where the forwarder listens.
func (f *Forwarder) Address() string { return f.listener.Addr().String() }

// Silence drops the packets of every connection that exists now: both ends see
// an open connection on which nothing arrives. New connections work.
func (f *Forwarder) Silence() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for p := range f.pairs {
		select {
		case <-p.silent:
		default:
			close(p.silent)
		}
	}
}

// Close ends every connection and waits until nothing runs any more.
func (f *Forwarder) Close() {
	_ = f.listener.Close()
	f.mu.Lock()
	for p := range f.pairs {
		_ = p.client.Close()
		_ = p.server.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

func (f *Forwarder) accept() {
	for {
		client, err := f.listener.Accept()
		if err != nil {
			return
		}
		address := f.target()
		if address == "" {
			_ = client.Close()
			continue
		}
		server, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "tcp", address)
		if err != nil {
			_ = client.Close()
			continue
		}
		p := &pair{client, server, make(chan struct{})}
		f.mu.Lock()
		f.pairs[p] = true
		f.mu.Unlock()
		f.wg.Go(func() {
			var both sync.WaitGroup
			both.Go(func() { p.forward(server, client) })
			both.Go(func() { p.forward(client, server) })
			both.Wait()
			f.mu.Lock()
			delete(f.pairs, p)
			f.mu.Unlock()
		})
	}
}

// forward copies one direction until it ends, and then ends both, unless the
// connection has been silenced: then whatever arrives is dropped, and not even
// the end of one side reaches the other.
func (p *pair) forward(to, from net.Conn) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		select {
		case <-p.silent:
			if err != nil {
				_ = from.Close()
				return
			}
			continue
		default:
		}
		if n > 0 {
			if _, werr := to.Write(buffer[:n]); werr != nil {
				err = werr
			}
		}
		if err != nil {
			_ = to.Close()
			_ = from.Close()
			return
		}
	}
}
