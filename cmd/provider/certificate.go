package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"github.com/hearth-ci/hearth/internal/config"
)

// renewWithin is how long before its end a certificate is worth a warning:
// cert-manager renews one of 90 days 30 days before.
const renewWithin = 14 * 24 * time.Hour

// checkCertificates says what of the server's certificate, key and authority
// will keep cluster-autoscaler from connecting.
func checkCertificates(files config.TLS, now time.Time) (advice []string) {
	if !files.Enabled() {
		return nil // config.Warnings says so
	}
	pair, err := tls.LoadX509KeyPair(files.CertFile, files.KeyFile)
	if err != nil {
		return []string{fmt.Sprintf("server.tls: the certificate and its key cannot be used: %v", err)}
	}
	certificate := pair.Leaf
	switch left := certificate.NotAfter.Sub(now); {
	case left <= 0:
		advice = append(advice, fmt.Sprintf("server.tls.certFile: it has expired on %s: renew it", certificate.NotAfter.Format(time.DateOnly)))
	case left < renewWithin:
		advice = append(advice, fmt.Sprintf("server.tls.certFile: it expires on %s and should have been renewed by now", certificate.NotAfter.Format(time.DateOnly)))
	}
	if len(certificate.DNSNames) == 0 && len(certificate.IPAddresses) == 0 {
		advice = append(advice, "server.tls.certFile: it is for no name, so that no client takes it: want DNS names such as hearth.NAMESPACE.svc")
	}
	authorities, err := os.ReadFile(files.ClientCAFile)
	if pool := x509.NewCertPool(); err != nil || !pool.AppendCertsFromPEM(authorities) {
		advice = append(advice, "server.tls.clientCAFile: it has no certificate: want the authority of cluster-autoscaler's certificate, as PEM")
	}
	return advice
}
