package server

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
)

// TLS names PEM files: the server's certificate and key, and the authorities
// of its clients. The zero value means plaintext; otherwise all are required.
type TLS struct {
	CertFile, KeyFile, ClientCAFile string
}

func (t TLS) validate() error {
	if t != (TLS{}) && (t.CertFile == "" || t.KeyFile == "" || t.ClientCAFile == "") {
		return errors.New("TLS: want all of CertFile, KeyFile and ClientCAFile, or none")
	}
	return nil
}

// certificates follows TLS files that change while they are in use. Every
// handshake reads them: they are small, connections are few and long, and so a
// new certificate holds from the next connection on. Files that cannot be used
// are reported once, and the last good ones stay in use.
type certificates struct {
	files TLS
	log   *slog.Logger

	mu      sync.Mutex
	read    [3][]byte // what is in use
	failure string    // of the last reading, empty after success
	pair    tls.Certificate
	clients *x509.CertPool
}

// loadCertificates fails when the files cannot be used.
func loadCertificates(files TLS, log *slog.Logger) (*certificates, error) {
	c := &certificates{files: files, log: log}
	if err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

// load brings the files into use if they changed.
func (c *certificates) load() error {
	var content [3][]byte
	for i, file := range []string{c.files.CertFile, c.files.KeyFile, c.files.ClientCAFile} {
		var err error
		if content[i], err = os.ReadFile(file); err != nil {
			return fmt.Errorf("reading TLS files: %w", err)
		}
	}
	if c.clients != nil && bytes.Equal(content[0], c.read[0]) && bytes.Equal(content[1], c.read[1]) && bytes.Equal(content[2], c.read[2]) {
		return nil
	}
	pair, err := tls.X509KeyPair(content[0], content[1])
	if err != nil {
		return fmt.Errorf("TLS certificate %q with key %q: %w", c.files.CertFile, c.files.KeyFile, err)
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(content[2]) {
		return fmt.Errorf("TLS client CA file %q: want PEM certificates", c.files.ClientCAFile)
	}
	c.read, c.pair, c.clients = content, pair, clients
	return nil
}

// current returns what is to be used now.
func (c *certificates) current() (tls.Certificate, *x509.CertPool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch err := c.load(); {
	case err == nil:
		c.failure = ""
	case err.Error() != c.failure:
		c.failure = err.Error()
		c.log.Error("TLS files cannot be used; those before stay in use", "err", err)
	}
	return c.pair, c.clients
}

// mutual is for CA's CloudProvider client: it must show a certificate.
func (c *certificates) mutual() *tls.Config {
	return c.config(func(pair tls.Certificate, clients *x509.CertPool) *tls.Config {
		return &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{pair},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    clients,
		}
	})
}

// serverOnly is for CA's expander client: it has no certificate to show.
func (c *certificates) serverOnly() *tls.Config {
	return c.config(func(pair tls.Certificate, _ *x509.CertPool) *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	})
}

func (c *certificates) config(of func(tls.Certificate, *x509.CertPool) *tls.Config) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return of(c.current()), nil
		},
	}
}
