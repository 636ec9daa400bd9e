package explain

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Find returns the group of that id, or the node of that name or instance id,
// in full or short as tables show it, with its group; an error that lists
// similar names when there is neither, or several of that short name.
func (r *Report) Find(name string) (*Group, *Node, error) {
	for i := range r.Groups {
		if r.Groups[i].ID == name {
			return &r.Groups[i], nil, nil
		}
	}
	for i := range r.Groups {
		g := &r.Groups[i]
		for j := range g.Nodes {
			if n := &g.Nodes[j]; n.Name == name || n.Instance == name {
				return g, n, nil
			}
		}
	}
	if g, n, err := r.findShort(name); n != nil || err != nil {
		return g, n, err
	}
	err := fmt.Errorf("no node group, node or instance is called %q", name)
	if near := r.near(name); len(near) > 0 {
		err = fmt.Errorf("%w; similar are %s", err, strings.Join(near, ", "))
	} else if len(r.Groups) > 0 {
		ids := make([]string, 0, len(r.Groups))
		for _, g := range r.Groups[:min(len(r.Groups), mostNear)] {
			ids = append(ids, g.ID)
		}
		err = fmt.Errorf("%w; node groups are %s", err, strings.Join(ids, ", "))
	}
	return nil, nil, err
}

// findShort returns the one node of that short name, none when there is none.
func (r *Report) findShort(name string) (*Group, *Node, error) {
	var group *Group
	var node *Node
	for i := range r.Groups {
		for j := range r.Groups[i].Nodes {
			n := &r.Groups[i].Nodes[j]
			if n.short() != name {
				continue
			}
			if node != nil {
				return nil, nil, fmt.Errorf("%q may be %s or %s", name, node.Label(), n.Label())
			}
			group, node = &r.Groups[i], n
		}
	}
	return group, node, nil
}

// mostNear bounds the names that are offered instead of one that there is not.
const mostNear = 5

// near are the names most like one: those that contain it, or that a few
// typing mistakes make of it.
func (r *Report) near(name string) []string {
	type candidate struct {
		name string
		far  int
	}
	var all []candidate
	consider := func(have string) {
		if have == "" {
			return
		}
		if len(name) >= 3 && strings.Contains(strings.ToLower(have), strings.ToLower(name)) {
			all = append(all, candidate{have, 0})
		} else if far := distance(have, name); far <= max(2, len(name)/5) {
			all = append(all, candidate{have, far})
		}
	}
	for _, g := range r.Groups {
		consider(g.ID)
		for _, n := range g.Nodes {
			consider(n.Name)
			consider(n.Instance)
		}
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Or(cmp.Compare(a.far, b.far), cmp.Compare(a.name, b.name)) })
	var near []string
	for _, c := range all[:min(len(all), mostNear)] {
		near = append(near, c.name)
	}
	return near
}

// distance is how many letters have to be added, taken away or changed to make
// b of a. Names that are much longer than names are do not resemble any.
func distance(a, b string) int {
	const longest = 256
	if len(a) > longest || len(b) > longest {
		return longest
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := before
			if a[i] != b[j] {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
