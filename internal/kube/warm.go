package kube

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

// WarmLabel returns the name of the label that a node bears, with the value
// "warm", while its engine is warm for the key. It is valid for any key: its
// name ends in the first 16 hex digits of the key's SHA-256.
func WarmLabel(key model.CacheKey) string { return labelWarmPrefix + warmHash(key) }

func warmHash(key model.CacheKey) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:8])
}

// WarmLabels returns which of a node's labels say that it is warm for a key.
func WarmLabels(labels map[string]string) (names []string) {
	for name, value := range labels {
		if value == warm && strings.HasPrefix(name, labelWarmPrefix) {
			names = append(names, name)
		}
	}
	return names
}

// markWarm makes the warm labels those of keys, and tells people in an
// annotation which hash stands for which key.
func markWarm(o *corev1.Node, keys model.WarmKeys) {
	names := map[string]model.CacheKey{}
	for _, key := range keys {
		if key != "" {
			names[warmHash(key)] = key
		}
	}
	for name := range o.Labels {
		if hash, ours := strings.CutPrefix(name, labelWarmPrefix); ours && names[hash] == "" {
			delete(o.Labels, name)
		}
	}
	for hash := range names {
		set(&o.Labels, labelWarmPrefix+hash, warm)
	}
	if len(names) == 0 {
		delete(o.Annotations, annotationWarmKeys)
		return
	}
	set(&o.Annotations, annotationWarmKeys, readable(names))
}

func readable(names map[string]model.CacheKey) string {
	var b strings.Builder
	out := json.NewEncoder(&b)
	out.SetEscapeHTML(false) // people read it
	_ = out.Encode(names)    // texts can always be encoded
	return strings.TrimSuffix(b.String(), "\n")
}

// warmKeys says for which keys the node's labels call it warm. A label that
// the annotation does not explain, as somebody else would leave it, stands for
// itself: it is nobody's key.
func warmKeys(n *corev1.Node) (keys model.WarmKeys) {
	var found []model.CacheKey
	var names map[string]model.CacheKey
	for name, value := range n.Labels {
		hash, ours := strings.CutPrefix(name, labelWarmPrefix)
		if !ours {
			continue
		}
		if names == nil {
			_ = json.Unmarshal([]byte(n.Annotations[annotationWarmKeys]), &names) // unreadable: explains nothing
		}
		key := names[hash]
		if value != warm || key == "" || warmHash(key) != hash {
			key = model.CacheKey(name)
		}
		found = append(found, key)
	}
	slices.Sort(found)
	copy(keys[:], found)
	return keys
}
