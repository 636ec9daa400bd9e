package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/config"
)

func TestCheckCertificates(t *testing.T) {
	now := time.Now()
	files := func(t *testing.T, until time.Time, names ...string) config.TLS {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: until, DNSNames: names}
		certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		c := config.TLS{CertFile: filepath.Join(t.TempDir(), "tls.crt"), KeyFile: filepath.Join(t.TempDir(), "tls.key")}
		c.ClientCAFile = c.CertFile
		for path, block := range map[string]*pem.Block{c.CertFile: {Type: "CERTIFICATE", Bytes: certificate}, c.KeyFile: {Type: "PRIVATE KEY", Bytes: private}} {
			if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return c
	}
	good := files(t, now.Add(90*24*time.Hour), "hearth.hearth.svc")
	mixed := good
	mixed.KeyFile = files(t, now.Add(90*24*time.Hour), "hearth.hearth.svc").KeyFile
	without := good
	without.ClientCAFile = good.KeyFile
	for name, tc := range map[string]struct {
		files config.TLS
		says  string
	}{
		"good":               {good, ""},
		"none":               {config.TLS{}, ""},
		"expired":            {files(t, now.Add(-time.Minute), "hearth.hearth.svc"), "it has expired on"},
		"about to expire":    {files(t, now.Add(24*time.Hour), "hearth.hearth.svc"), "should have been renewed"},
		"for nobody":         {files(t, now.Add(90*24*time.Hour)), "it is for no name"},
		"a key of another":   {mixed, "cannot be used"},
		"not an authority's": {without, "server.tls.clientCAFile: it has no certificate"},
	} {
		advice := strings.Join(checkCertificates(tc.files, now), "\n")
		if tc.says == "" && advice != "" || !strings.Contains(advice, tc.says) {
			t.Errorf("%s: said %q, want %q", name, advice, tc.says)
		}
	}
}
