package placement

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Fields of the Secret beside those that every TLS Secret has.
const (
	fieldCA    = "ca.crt"
	fieldCAKey = "ca.key"
)

const (
	// followEvery is how often a replica looks for a new certificate, and the
	// leader after it and the webhook's configuration; hurry the same while
	// there is none or something failed.
	followEvery = 30 * time.Second
	hurry       = 2 * time.Second
)

// SecretConfig is what a Secret needs. All fields are required.
type SecretConfig struct {
	Client    client.Client
	Namespace string
	Name      string // of the Secret
	// Webhook is the name of the MutatingWebhookConfiguration whose CA is to be
	// ours, Hosts the names and addresses that it is reached by.
	Webhook string
	Hosts   []string
	Now     func() time.Time
	Logger  *slog.Logger
}

// Secret is a certificate of our own, in a Secret with the authority that
// signed it. Every replica follows it; the leader makes and renews it and tells
// the API server whom to trust. Its methods are safe for concurrent use.
type Secret struct {
	cfg     SecretConfig
	current atomic.Pointer[tls.Certificate]
}

// NewSecret returns a certificate that was not read yet.
func NewSecret(cfg SecretConfig) (*Secret, error) {
	if cfg.Client == nil || cfg.Namespace == "" || cfg.Name == "" || cfg.Webhook == "" || len(cfg.Hosts) == 0 || cfg.Now == nil || cfg.Logger == nil {
		return nil, errors.New("making the placement certificate: a field of its configuration is missing")
	}
	return &Secret{cfg: cfg}, nil
}

var errNoCertificate = errors.New("the leader has made no certificate yet")

// Certificate returns what is to be used now.
func (s *Secret) Certificate() (*tls.Certificate, error) {
	if pair := s.current.Load(); pair != nil {
		return pair, nil
	}
	return nil, errNoCertificate
}

// Follow reads the Secret again and again until ctx ends.
func (s *Secret) Follow(ctx context.Context) {
	s.repeat(ctx, "reading the placement certificate", s.read)
}

// Lead keeps the Secret and the webhook's configuration in order until ctx
// ends. Two at a time do no harm.
func (s *Secret) Lead(ctx context.Context) {
	s.repeat(ctx, "keeping the placement certificate", s.keep)
}

// repeat logs a failure when it is another than the one before.
func (s *Secret) repeat(ctx context.Context, doing string, f func(context.Context) error) {
	said := ""
	for {
		err := f(ctx)
		if ctx.Err() != nil {
			return
		}
		pause := followEvery
		switch {
		case err == nil:
			said = ""
		case errors.Is(err, errNoCertificate):
			pause = hurry
		default:
			pause = hurry
			if err.Error() != said {
				said = err.Error()
				s.cfg.Logger.Error(doing+" failed; trying again", "err", err)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (s *Secret) get(ctx context.Context) (*corev1.Secret, error) {
	object := &corev1.Secret{}
	err := s.cfg.Client.Get(ctx, client.ObjectKey{Namespace: s.cfg.Namespace, Name: s.cfg.Name}, object)
	return object, err
}

func (s *Secret) read(ctx context.Context) error {
	object, err := s.get(ctx)
	if apierrors.IsNotFound(err) {
		return errNoCertificate
	}
	if err != nil {
		return err
	}
	return s.use(object)
}

func (s *Secret) use(object *corev1.Secret) error {
	pair, err := tls.X509KeyPair(object.Data[corev1.TLSCertKey], object.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return fmt.Errorf("secret %q: %w", s.cfg.Name, err)
	}
	s.current.Store(&pair)
	return nil
}

// keep makes or renews what the Secret lacks, and makes the API server trust
// it. A conflict is another replica that does the same: the next round reads
// what came of it.
func (s *Secret) keep(ctx context.Context) error {
	object, err := s.get(ctx)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return err
	}
	bundle, changed, err := renewed(bundle{
		ca: object.Data[fieldCA], caKey: object.Data[fieldCAKey],
		cert: object.Data[corev1.TLSCertKey], key: object.Data[corev1.TLSPrivateKeyKey],
	}, s.cfg.Hosts, s.cfg.Now())
	if err != nil {
		return err
	}
	if changed {
		object.ObjectMeta = metav1.ObjectMeta{
			Namespace: s.cfg.Namespace, Name: s.cfg.Name, UID: object.UID, ResourceVersion: object.ResourceVersion,
			Labels: object.Labels, Annotations: object.Annotations,
		}
		if missing {
			object.Type = corev1.SecretTypeTLS
		}
		object.Data = map[string][]byte{
			fieldCA: bundle.ca, fieldCAKey: bundle.caKey,
			corev1.TLSCertKey: bundle.cert, corev1.TLSPrivateKeyKey: bundle.key,
		}
		if missing {
			err = s.cfg.Client.Create(ctx, object)
		} else {
			err = s.cfg.Client.Update(ctx, object)
		}
		if err != nil {
			return err
		}
		s.cfg.Logger.Info("the placement certificate was made anew")
	}
	if err := s.use(object); err != nil {
		return err
	}
	return s.trust(ctx, bundle.ca)
}

// trust makes the API server trust the authority when it calls the webhook.
func (s *Secret) trust(ctx context.Context, ca []byte) error {
	hook := &admissionregistrationv1.MutatingWebhookConfiguration{}
	if err := s.cfg.Client.Get(ctx, client.ObjectKey{Name: s.cfg.Webhook}, hook); err != nil {
		return err
	}
	before := hook.DeepCopy()
	stale := false
	for i := range hook.Webhooks {
		c := &hook.Webhooks[i].ClientConfig
		stale = stale || !bytes.Equal(c.CABundle, ca)
		c.CABundle = ca
	}
	if !stale {
		return nil
	}
	// Webhooks are one list to a patch: without the lock it would take back
	// what somebody else has changed in it meanwhile.
	return s.cfg.Client.Patch(ctx, hook, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
}
