// Package scoring decides what warmth is worth: how warm a node is, which idle
// nodes stay, which are parked or go and in what order, which parked node
// comes back first and when before it is asked for, where a job is placed, and
// which node group a scale-up should take. It is pure: time is an argument,
// every decision carries its reasons, and the result does not depend on the
// order of its input. It never acts and knows no cluster.
package scoring

import (
	"math"
	"slices"
	"time"
	"unique"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// HalfLife of warmth: after a day the repository has moved on by as much
	// as it kept.
	HalfLife = 24 * time.Hour
	// KeysHeld is how many of the most recently used keys an engine is
	// believed to hold; later keys push older ones out of its disk budget.
	KeysHeld = 20
	// WarmFor is how long after its last use a key counts as warm at all:
	// engines cut cache mounts after 48 h and the rest decays.
	WarmFor = 72 * time.Hour
)

// Key is a cache key, made cheap to compare and to look up.
type Key = unique.Handle[model.CacheKey]

// KeyOf returns the key of that name.
func KeyOf(name model.CacheKey) Key { return unique.Make(name) }

// Use is what a node's engine is known to have done for one key.
type Use struct {
	Key   Key
	Last  time.Time // end of the last job of this key, or its start while it runs
	Count int       // jobs of this key that ran here
}

// Used returns uses with one more, or newer, use of a key. Lists of uses are
// ordered by last use, the latest first; it keeps at most model.MaxWarmKeys.
func Used(uses []Use, u Use) []Use {
	i := slices.IndexFunc(uses, func(have Use) bool { return have.Key == u.Key })
	if i < 0 {
		i = len(uses)
		uses = append(uses, u)
	}
	uses[i] = u
	for ; i > 0 && uses[i].Last.After(uses[i-1].Last); i-- {
		uses[i], uses[i-1] = uses[i-1], uses[i]
	}
	return uses[:min(len(uses), model.MaxWarmKeys)]
}

// Warmth of one key, from 0 (cold) to 1 (just used).
func (u Use) Warmth(now time.Time) float64 {
	age := max(now.Sub(u.Last), 0)
	if u.Count == 0 || age > WarmFor {
		return 0
	}
	return faded[age/time.Minute]
}

// faded is warmth by age in minutes: a constant that Go cannot spell.
//
//nolint:gochecknoglobals // see above
var faded = func() (table [WarmFor/time.Minute + 1]float64) {
	for age := range table {
		table[age] = math.Exp2(-float64(age) / HalfLife.Minutes())
	}
	return table
}()

// Node is one instance as the policy sees it.
type Node struct {
	Instance model.InstanceID
	// Parked: it is stopped with its cache intact.
	Parked bool
	// IdleSince is when the node last became idle, or ready if it has run
	// nothing since; of a parked one when it was used last.
	IdleSince time.Time
	// ReleasedAt is since when the plan lets the node go; zero when it keeps it.
	ReleasedAt time.Time
	// WantedAt is since when the forecast pays for a node that was let go; zero
	// when it does not.
	WantedAt time.Time
	// Uses are the keys whose jobs ran here, the last used first.
	Uses []Use
}

// held are the uses whose cache the engine is believed to hold.
func (n Node) held() []Use { return n.Uses[:min(len(n.Uses), KeysHeld)] }

// WarmthFor returns how warm the node is for one key.
func (n Node) WarmthFor(key Key, now time.Time) float64 {
	for _, u := range n.held() {
		if u.Key == key {
			return u.Warmth(now)
		}
	}
	return 0
}

// Stock counts, for every cache key, the nodes at hand that are warm for it.
// The zero value counts nothing and cannot be added to; it is not safe for
// concurrent use.
type Stock struct{ copies map[Key]int }

// NewStock counts the copies on nodes.
func NewStock(nodes []Node, now time.Time) Stock {
	s := Stock{make(map[Key]int)}
	for _, n := range nodes {
		for _, u := range n.held() {
			if u.Warmth(now) > 0 {
				s.copies[u.Key]++
			}
		}
	}
	return s
}

// Add counts a node's copies, and returns the keys that it counted.
func (s Stock) Add(n Node, now time.Time) (counted []Key) {
	for _, u := range n.held() {
		if u.Warmth(now) > 0 {
			s.copies[u.Key]++
			counted = append(counted, u.Key)
		}
	}
	return counted
}

// Remove takes back what an Add has counted.
func (s Stock) Remove(counted []Key) {
	for _, k := range counted {
		if s.copies[k]--; s.copies[k] == 0 {
			delete(s.copies, k)
		}
	}
}

// Missed is what others lose while a node of the stock is taken by a job of
// the key except: the seconds that the next job is expected to save by its
// other keys. A key that other nodes are warm for too counts half for each of
// them. It costs the number of keys held.
func (s Stock) Missed(n Node, except Key, keys *Keys, now time.Time) (seconds float64) {
	for _, u := range n.held() {
		if u.Key == except {
			continue
		}
		if w := u.Warmth(now); w > 0 {
			others := max(s.copies[u.Key]-1, 0)
			seconds += math.Ldexp(w*keys.Worth(u.Key), -others)
		}
	}
	return seconds
}
