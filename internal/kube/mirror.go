package kube

import (
	"fmt"
	"reflect"
	"sync"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
)

// mirror is what a reflector keeps its objects in: not the objects, but the
// little that matters of each. It is a store that can only be written; who is
// interested is told of changes, one at a time, in the order in which the API
// server made them.
type mirror[T any] struct {
	feed *Feed
	// strip drops most of what is not read: a reflector holds a whole list of
	// objects for a moment. read says what matters; false: nothing does.
	strip func(any)
	read  func(any) (T, bool)
	// changed and gone are called with the feed locked.
	changed func(T)
	gone    func(T)
	// another says whether an object has become another thing to whoever is
	// told: then its end is told before its beginning. nil: never.
	another func(before, now T) bool

	items  map[types.UID]T
	synced chan struct{} // closed once a whole list has been taken over
	once   sync.Once
}

var _ cache.TransformingStore = (*mirror[int])(nil)

func (m *mirror[T]) Add(obj any) error { return m.Update(obj) }

func (m *mirror[T]) Update(obj any) error {
	m.feed.mu.Lock()
	defer m.feed.mu.Unlock()
	return m.put(obj)
}

// put takes an object over.
func (m *mirror[T]) put(obj any) error {
	uid, err := uidOf(obj)
	if err != nil {
		return err
	}
	item, matters := m.read(obj)
	if !matters {
		m.drop(uid)
		return nil
	}
	old, known := m.items[uid]
	if known && reflect.DeepEqual(old, item) {
		return nil
	}
	if known && m.another != nil && m.another(old, item) {
		m.gone(old)
	}
	m.items[uid] = item
	m.changed(item)
	return nil
}

func (m *mirror[T]) drop(uid types.UID) {
	if item, known := m.items[uid]; known {
		delete(m.items, uid)
		m.gone(item)
	}
}

func (m *mirror[T]) Delete(obj any) error {
	uid, err := uidOf(obj)
	if err != nil {
		return err
	}
	m.feed.mu.Lock()
	defer m.feed.mu.Unlock()
	m.drop(uid)
	return nil
}

// Replace takes over a whole list. What is gone is told first: an object made
// anew under the same name must not seem to end after it began.
func (m *mirror[T]) Replace(list []any, _ string) error {
	m.feed.mu.Lock()
	defer m.feed.mu.Unlock()
	present := make(map[types.UID]bool, len(list))
	for _, obj := range list {
		uid, err := uidOf(obj)
		if err != nil {
			return err
		}
		present[uid] = true
	}
	for uid := range m.items {
		if !present[uid] {
			m.drop(uid)
		}
	}
	for _, obj := range list {
		if err := m.put(obj); err != nil {
			return err
		}
	}
	m.once.Do(func() { close(m.synced) })
	return nil
}

func (m *mirror[T]) Resync() error { return nil }

func (m *mirror[T]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		m.strip(obj)
		return obj, nil
	}
}

func uidOf(obj any) (types.UID, error) {
	object, err := meta.Accessor(obj)
	if err != nil {
		return "", fmt.Errorf("reading a watched object: %w", err)
	}
	return object.GetUID(), nil
}
