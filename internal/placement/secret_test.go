package placement

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

const host = "hearth-placement.hearth.svc"

// hook is the webhook configuration as it is installed, with another's webhook
// in the same object.
func hook() *admissionregistrationv1.MutatingWebhookConfiguration {
	return &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "hearth-placement"},
		Webhooks:   []admissionregistrationv1.MutatingWebhook{{Name: "placement.hearth.dev"}, {Name: "too.hearth.dev"}},
	}
}

func newSecret(t *testing.T, c client.Client, now *time.Time) *Secret {
	t.Helper()
	s, err := NewSecret(SecretConfig{
		Client: c, Namespace: "hearth", Name: "hearth-placement", Webhook: "hearth-placement", Hosts: []string{host, "127.0.0.1"},
		Now: func() time.Time { return *now }, Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	return s
}

// verify is what the API server does when it calls the webhook.
func verify(t *testing.T, c client.Client, s *Secret, now time.Time) {
	t.Helper()
	var h admissionregistrationv1.MutatingWebhookConfiguration
	must(t, c.Get(t.Context(), client.ObjectKey{Name: "hearth-placement"}, &h))
	pair, err := s.Certificate()
	must(t, err)
	for _, w := range h.Webhooks {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(w.ClientConfig.CABundle) {
			t.Fatalf("the CA bundle of %s holds no certificate", w.Name)
		}
		for _, name := range []string{host, "127.0.0.1"} {
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name, CurrentTime: now}); err != nil {
				t.Errorf("%s at %s: %v", w.Name, name, err)
			}
		}
	}
}

func TestSecretIsMadeFollowedAndRenewed(t *testing.T) {
	c := fake.NewClientBuilder().WithObjects(hook()).Build()
	now := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	leader, follower := newSecret(t, c, &now), newSecret(t, c, &now)
	if _, err := leader.Certificate(); !errors.Is(err, errNoCertificate) {
		t.Errorf("before there is one: %v", err)
	}
	if err := follower.read(t.Context()); !errors.Is(err, errNoCertificate) {
		t.Errorf("a follower before there is one: %v", err)
	}
	serial := func(s *Secret) string {
		must(t, leader.keep(t.Context()))
		must(t, follower.read(t.Context()))
		verify(t, c, leader, now)
		verify(t, c, follower, now)
		pair, err := s.Certificate()
		must(t, err)
		return pair.Leaf.SerialNumber.String()
	}
	first := serial(follower)
	now = now.Add(200 * 24 * time.Hour)
	if serial(follower) != first {
		t.Error("it was renewed with more than a third of its life left")
	}
	now = now.Add(60 * 24 * time.Hour)
	second := serial(follower)
	if second == first {
		t.Error("it was not renewed")
	}
	for name, spoil := range map[string]func(map[string][]byte){
		"certificate gone":     func(d map[string][]byte) { delete(d, corev1.TLSCertKey) },
		"key of another":       func(d map[string][]byte) { d[corev1.TLSPrivateKeyKey] = d[fieldCAKey] },
		"authority unreadable": func(d map[string][]byte) { d[fieldCA] = []byte("x") },
		"everything gone":      func(d map[string][]byte) { clear(d) },
		"no authority but leaf": func(d map[string][]byte) {
			d[fieldCA], d[fieldCAKey] = d[corev1.TLSCertKey], d[corev1.TLSPrivateKeyKey]
		},
	} {
		var object corev1.Secret
		must(t, c.Get(t.Context(), client.ObjectKey{Namespace: "hearth", Name: "hearth-placement"}, &object))
		spoil(object.Data)
		must(t, c.Update(t.Context(), &object))
		before := second
		if second = serial(follower); second == before {
			t.Errorf("%s: not made anew", name)
		}
	}
	// A person applies the manifest again: the bundle goes.
	var h admissionregistrationv1.MutatingWebhookConfiguration
	must(t, c.Get(t.Context(), client.ObjectKey{Name: "hearth-placement"}, &h))
	h.Webhooks[0].ClientConfig.CABundle = nil
	must(t, c.Update(t.Context(), &h))
	if serial(follower) != second {
		t.Error("a bundle that is gone made a new certificate")
	}
	leader.cfg.Hosts = append(leader.cfg.Hosts, "another.svc")
	if serial(follower) == second {
		t.Error("another host, and the same certificate")
	}
}

// Writes are made only when something is to be changed, and a race that was
// lost is settled in the next round.
func TestSecretWrites(t *testing.T) {
	writes, conflicts := 0, 1
	inner := fake.NewClientBuilder().WithObjects(hook()).Build()
	c := interceptor.NewClient(inner, interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			writes++
			if conflicts > 0 {
				conflicts--
				return apierrors.NewAlreadyExists(schema.GroupResource{Resource: "secrets"}, o.GetName())
			}
			return c.Create(ctx, o, opts...)
		},
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			writes++
			return c.Update(ctx, o, opts...)
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			writes++
			return c.Patch(ctx, o, p, opts...)
		},
	})
	now := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	s := newSecret(t, c, &now)
	if err := s.keep(t.Context()); !apierrors.IsAlreadyExists(err) {
		t.Errorf("a lost race: %v", err)
	}
	for range 5 {
		must(t, s.keep(t.Context()))
	}
	if writes != 3 { // the race, the Secret, the webhook configuration
		t.Errorf("%d writes", writes)
	}
	verify(t, c, s, now)
}

func TestSecretLoops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fake.NewClientBuilder().WithObjects(hook()).Build()
		now := time.Now()
		leader, follower := newSecret(t, c, &now), newSecret(t, c, &now)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan bool, 2)
		go func() { follower.Follow(ctx); ended <- true }()
		time.Sleep(time.Minute)
		go func() { leader.Lead(ctx); ended <- true }()
		time.Sleep(hurry + time.Second)
		if _, err := follower.Certificate(); err != nil {
			t.Errorf("the follower: %v", err)
		}
		cancel()
		<-ended
		<-ended
	})
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(content []byte, file string) { must(t, os.WriteFile(file, content, 0o600)) }
	if _, err := NewFiles(cert, key, slog.New(slog.DiscardHandler)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files that are missing: %v", err)
	}
	b, _, err := renewed(bundle{}, []string{host}, time.Now())
	must(t, err)
	write(b.cert, cert)
	write(b.key, key)
	var log bytes.Buffer
	f, err := NewFiles(cert, key, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	current := func() *tls.Certificate {
		pair, err := f.Certificate()
		must(t, err)
		return pair
	}
	first := current()
	write([]byte("half"), cert)
	for range 2 {
		if current() != first {
			t.Error("a file that cannot be used is in use")
		}
	}
	if bytes.Count(log.Bytes(), []byte("\n")) != 1 {
		t.Errorf("it was not logged once: %s", log.Bytes())
	}
	b, _, err = renewed(bundle{}, []string{host}, time.Now())
	must(t, err)
	write(b.cert, cert)
	write(b.key, key)
	if second := current(); second == first || second != current() {
		t.Error("the new files are not in use")
	}
}
