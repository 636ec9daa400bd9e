package aws

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Tags that cluster-autoscaler's own provider gives a meaning (its README,
// "Auto-discovery setup").
const (
	templateTag = "k8s.io/cluster-autoscaler/node-template/"
	labelTag    = templateTag + "label/"
	taintTag    = templateTag + "taint/"
	resourceTag = templateTag + "resources/"
	optionTag   = templateTag + "autoscaling-options/"
)

// optionKeys are the annotations that those option tags stand for.
func optionKeys() map[string]string {
	return map[string]string{
		"scaledownutilizationthreshold":    "scale-down-utilization-threshold",
		"scaledowngpuutilizationthreshold": "scale-down-gpu-utilization-threshold",
		"scaledownunneededtime":            "scale-down-unneeded-time",
		"scaledownunreadytime":             "scale-down-unready-time",
		"maxnodeprovisiontime":             "max-node-provision-time",
		"ignoredaemonsetsutilization":      "ignore-daemonsets-utilization",
	}
}

// templatesEvery is how old what is known of launch templates, instance types
// and managed node groups may be.
const templatesEvery = 10 * time.Minute

// discoverEvery is how old what was read of all groups may be where no
// snapshots are taken: in a replica that does not lead.
const discoverEvery = 3 * time.Minute

// templates caches what templates are made of. It belongs to Discover, which
// is not called concurrently.
type templates struct {
	numbers    map[string]cached[numbers] // by launch template
	versions   map[string]ec2types.ResponseLaunchTemplateData
	configs    map[string]cached[string]
	smallest   map[string]cached[string]            // by instance requirements
	types      map[string]ec2types.InstanceTypeInfo // these do not change
	nodegroups map[string]cached[nodegroup]
	last       map[model.GroupID]model.Template // the last good one of each group
	assumed    map[model.GroupID]string         // what is said of a price that is in no list
}

type cached[T any] struct {
	value T
	at    time.Time
}

type nodegroup struct {
	labels map[string]string
	taints []model.Taint
}

func newTemplates() templates {
	return templates{
		numbers: map[string]cached[numbers]{}, versions: map[string]ec2types.ResponseLaunchTemplateData{}, configs: map[string]cached[string]{},
		smallest: map[string]cached[string]{}, types: map[string]ec2types.InstanceTypeInfo{}, nodegroups: map[string]cached[nodegroup]{},
		last: map[model.GroupID]model.Template{}, assumed: map[model.GroupID]string{},
	}
}

// Discover declares the groups that are selected, sorted by id: sizes and tags
// as last read, templates as of the last ten minutes. A group whose template
// cannot be made keeps its last one; without any it is left out and logged.
func (b *Backend) Discover(ctx context.Context) ([]model.NodeGroup, error) {
	now := b.cfg.Now()
	b.mu.Lock()
	known := !b.readAt.IsZero() && now.Sub(b.readAt) < discoverEvery
	b.mu.Unlock()
	if !known {
		read, err := b.listAll(ctx)
		if err != nil {
			return nil, fmt.Errorf("reading Auto Scaling groups: %w", err)
		}
		b.take(read, true, now, map[model.GroupID]error{})
	}
	b.mu.Lock()
	asgs := make([]astypes.AutoScalingGroup, 0, len(b.groups))
	for _, id := range slices.Sorted(maps.Keys(b.groups)) {
		asgs = append(asgs, b.groups[id].asg)
	}
	b.mu.Unlock()
	if err := b.follow(ctx, asgs); err != nil {
		b.cfg.Logger.Error("following launch templates failed; the versions known before apply", "err", err)
	}
	var out []model.NodeGroup
	for _, asg := range asgs {
		id := model.GroupID(awssdk.ToString(asg.AutoScalingGroupName))
		template, err := b.template(ctx, asg)
		if err != nil {
			last, ok := b.templates.last[id]
			b.cfg.Logger.Error("the group's template cannot be made", "nodegroup", id, "keeps the last", ok, "err", err)
			if !ok {
				continue
			}
			template = last
		}
		b.templates.last[id] = template
		b.mu.Lock()
		if g := b.groups[id]; g != nil {
			g.version = b.launches(asg)
		}
		b.mu.Unlock()
		most := int(awssdk.ToInt32(asg.MaxSize))
		out = append(out, model.NodeGroup{
			ID: id, Min: min(int(awssdk.ToInt32(asg.MinSize)), most), Max: most,
			Template: template, Annotations: b.annotations(id, asg, template),
		})
	}
	return out, nil
}

// Run declares the groups whenever they change, and keeps the instances of
// those that want it protected from scale in, until ctx ends.
func (b *Backend) Run(ctx context.Context, declare func([]model.NodeGroup)) error {
	var before []model.NodeGroup
	declared := false
	ticker := time.NewTicker(10 * time.Second)
	defer ticker.Stop()
	for n := 0; ; n++ {
		if n%3 == 0 || !declared {
			groups, err := b.Discover(ctx)
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				b.cfg.Logger.Error("discovering groups failed; those known go on", "err", err)
			case !declared || !reflect.DeepEqual(groups, before):
				before, declared = groups, true
				declare(groups)
			}
		}
		b.protectAll(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-b.changed:
			n = -1
		case <-ticker.C:
		}
	}
}

// protectAll protects what the last readings show unprotected.
func (b *Backend) protectAll(ctx context.Context) {
	if b.cfg.DryRun {
		return
	}
	b.mu.Lock()
	var todo []reading
	for _, id := range slices.Sorted(maps.Keys(b.groups)) {
		if !b.cfg.Protect(id) {
			continue
		}
		r := reading{name: string(id)}
		for _, i := range b.groups[id].asg.Instances {
			_, ended := b.groups[id].ended[awssdk.ToString(i.InstanceId)]
			r.members = append(r.members, member{
				id: awssdk.ToString(i.InstanceId), lifecycle: i.LifecycleState, protected: awssdk.ToBool(i.ProtectedFromScaleIn), ended: ended,
			})
		}
		todo = append(todo, r)
	}
	b.mu.Unlock()
	for _, r := range todo {
		if err := b.protect(ctx, r); err != nil {
			if ctx.Err() == nil {
				b.cfg.Logger.Warn("protecting instances failed; it will be tried again", "nodegroup", r.name, "err", err)
			}
			continue
		}
		b.mu.Lock()
		if g := b.groups[model.GroupID(r.name)]; g != nil {
			g.asg.Instances = slices.Clone(g.asg.Instances)
			for at := range g.asg.Instances {
				i := &g.asg.Instances[at]
				if i.LifecycleState == astypes.LifecycleStateInService && slices.ContainsFunc(r.members, func(m member) bool { return m.id == awssdk.ToString(i.InstanceId) }) {
					i.ProtectedFromScaleIn = awssdk.Bool(true)
				}
			}
		}
		b.mu.Unlock()
	}
}

func tagsOf(asg astypes.AutoScalingGroup) map[string]string {
	tags := make(map[string]string, len(asg.Tags))
	for _, t := range asg.Tags {
		tags[awssdk.ToString(t.Key)] = awssdk.ToString(t.Value)
	}
	return tags
}

// managed says whether the group belongs to an EKS managed node group.
func (b *Backend) managed(name string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.groups[model.GroupID(name)]
	return g != nil && tagsOf(g.asg)["eks:nodegroup-name"] != ""
}

// annotations are those of tags, under those of the config file. The list
// price, or an estimate of it, is there unless something says otherwise, but not
// for spot instances.
func (b *Backend) annotations(id model.GroupID, asg astypes.AutoScalingGroup, t model.Template) map[string]string {
	out := map[string]string{}
	tags := tagsOf(asg)
	for option, key := range optionKeys() {
		if v, ok := tags[optionTag+option]; ok {
			out[model.Prefix+"/"+key] = v
		}
	}
	for k, v := range tags {
		if strings.HasPrefix(k, model.Prefix+"/") {
			out[k] = v
		}
	}
	for _, g := range b.named() {
		if g.ID == id {
			maps.Copy(out, g.Annotations)
		}
	}
	said := ""
	if _, told := out[priceKey]; !told && !spotOnly(asg) {
		p, ok := b.cfg.Prices[t.InstanceType]
		if !ok {
			p, said, ok = b.prices.price(b.cfg.Region, t.InstanceType, b.templates.types[t.InstanceType])
		}
		if said != "" {
			said += ": set " + priceKey + ", or backend.aws.prices"
		}
		if ok {
			out[priceKey] = strconv.FormatFloat(p, 'f', -1, 64)
		}
	}
	if said != "" && said != b.templates.assumed[id] {
		b.cfg.Logger.Warn(said, "nodegroup", id)
	}
	b.templates.assumed[id] = said
	return out
}

// priceKey is the annotation that says what an hour of a node costs.
const priceKey = model.Prefix + "/node-price"

func spotOnly(asg astypes.AutoScalingGroup) bool {
	p := asg.MixedInstancesPolicy
	if p == nil || p.InstancesDistribution == nil {
		return false
	}
	d := p.InstancesDistribution
	return d.OnDemandPercentageAboveBaseCapacity != nil && *d.OnDemandPercentageAboveBaseCapacity == 0 && awssdk.ToInt32(d.OnDemandBaseCapacity) == 0
}

// template describes a node of the group.
func (b *Backend) template(ctx context.Context, asg astypes.AutoScalingGroup) (model.Template, error) {
	name, data, err := b.instanceType(ctx, asg)
	if err != nil {
		return model.Template{}, err
	}
	info, err := b.typeInfo(ctx, name)
	if err != nil {
		return model.Template{}, err
	}
	t := describeNode(info, volume(data))
	t.Zone = firstOf(asg.AvailabilityZones)
	t.Labels["topology.ebs.csi.aws.com/zone"] = t.Zone
	if b.cfg.Region != "" {
		t.Labels["topology.kubernetes.io/region"] = b.cfg.Region
	}
	tags := tagsOf(asg)
	if cluster, ng := tags["eks:cluster-name"], tags["eks:nodegroup-name"]; cluster != "" && ng != "" && b.cfg.EKS != nil {
		described, err := b.nodegroup(ctx, cluster, ng)
		if err != nil {
			return model.Template{}, err
		}
		t.Labels["eks.amazonaws.com/nodegroup"] = ng
		maps.Copy(t.Labels, described.labels)
		t.Taints = append(t.Taints, described.taints...)
	}
	b.applyTags(model.GroupID(awssdk.ToString(asg.AutoScalingGroupName)), tags, &t)
	return t, nil
}

func firstOf(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return slices.Min(s)
}

// instanceType is the type of the group's first override, else of its launch
// template or configuration.
func (b *Backend) instanceType(ctx context.Context, asg astypes.AutoScalingGroup) (string, ec2types.ResponseLaunchTemplateData, error) {
	spec, override := templateOf(asg), ""
	if p := asg.MixedInstancesPolicy; p != nil && p.LaunchTemplate != nil {
		for _, o := range p.LaunchTemplate.Overrides {
			if override = awssdk.ToString(o.InstanceType); override != "" {
				break
			}
			if o.InstanceRequirements != nil {
				var err error
				if override, err = b.smallest(ctx, *o.InstanceRequirements); err != nil {
					return "", ec2types.ResponseLaunchTemplateData{}, err
				}
				break
			}
		}
	}
	var data ec2types.ResponseLaunchTemplateData
	switch {
	case spec != nil:
		var err error
		if data, err = b.version(ctx, awssdk.ToString(spec.LaunchTemplateId), awssdk.ToString(spec.Version)); err != nil {
			return "", data, err
		}
		if override == "" {
			override = string(data.InstanceType)
		}
	case asg.LaunchConfigurationName != nil:
		name := *asg.LaunchConfigurationName
		known, ok := b.templates.configs[name]
		if !ok {
			answer, err := b.cfg.AutoScaling.DescribeLaunchConfigurations(ctx, &autoscaling.DescribeLaunchConfigurationsInput{LaunchConfigurationNames: []string{name}})
			if err != nil {
				return "", data, fmt.Errorf("reading launch configuration %q: %w", name, err)
			}
			for _, c := range answer.LaunchConfigurations {
				known = cached[string]{value: awssdk.ToString(c.InstanceType)}
			}
			b.templates.configs[name] = known
		}
		override = known.value
	}
	if override == "" {
		return "", data, errors.New("neither the group nor its launch template names an instance type")
	}
	return override, data, nil
}

// smallest is the type with the least of CPU, then memory, that meets
// requirements: what fits on it fits on whatever AWS picks.
func (b *Backend) smallest(ctx context.Context, r astypes.InstanceRequirements) (string, error) {
	// The services' types differ in name only.
	text, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("reading instance requirements: %w", err)
	}
	key, now := string(text), b.cfg.Now()
	if known, ok := b.templates.smallest[key]; ok && now.Sub(known.at) < templatesEvery {
		return known.value, nil
	}
	var wanted ec2types.InstanceRequirementsRequest
	if err := json.Unmarshal(text, &wanted); err != nil {
		return "", fmt.Errorf("reading instance requirements: %w", err)
	}
	in := &ec2.GetInstanceTypesFromInstanceRequirementsInput{
		ArchitectureTypes:    []ec2types.ArchitectureType{ec2types.ArchitectureTypeX8664, ec2types.ArchitectureTypeArm64},
		VirtualizationTypes:  []ec2types.VirtualizationType{ec2types.VirtualizationTypeHvm},
		InstanceRequirements: &wanted,
	}
	var names []ec2types.InstanceType
	for {
		answer, err := b.cfg.EC2.GetInstanceTypesFromInstanceRequirements(ctx, in)
		if err != nil {
			return "", fmt.Errorf("reading the types that meet instance requirements: %w", err)
		}
		for _, t := range answer.InstanceTypes {
			names = append(names, ec2types.InstanceType(awssdk.ToString(t.InstanceType)))
		}
		if in.NextToken = answer.NextToken; awssdk.ToString(in.NextToken) == "" {
			break
		}
	}
	var found []ec2types.InstanceTypeInfo
	for part := range slices.Chunk(names, 100) {
		answer, err := b.cfg.EC2.DescribeInstanceTypes(ctx, &ec2.DescribeInstanceTypesInput{InstanceTypes: part})
		if err != nil {
			return "", fmt.Errorf("reading instance types: %w", err)
		}
		found = append(found, answer.InstanceTypes...)
	}
	if len(found) == 0 {
		return "", errors.New("no instance type meets the group's instance requirements")
	}
	least := slices.MinFunc(found, func(a, b ec2types.InstanceTypeInfo) int {
		return cmp.Or(cmp.Compare(cpusOf(a), cpusOf(b)), cmp.Compare(mibOf(a), mibOf(b)), cmp.Compare(a.InstanceType, b.InstanceType))
	})
	b.templates.smallest[key] = cached[string]{string(least.InstanceType), now}
	return string(least.InstanceType), nil
}

// templateOf is the launch template that a group launches from, nil when it has
// none.
func templateOf(asg astypes.AutoScalingGroup) *astypes.LaunchTemplateSpecification {
	if p := asg.MixedInstancesPolicy; p != nil && p.LaunchTemplate != nil {
		return p.LaunchTemplate.LaunchTemplateSpecification
	}
	return asg.LaunchTemplate
}

// launches names the launch template and version of the group's next instance,
// empty when that is not known.
func (b *Backend) launches(asg astypes.AutoScalingGroup) string {
	spec := templateOf(asg)
	if spec == nil {
		return ""
	}
	id, version := awssdk.ToString(spec.LaunchTemplateId), awssdk.ToString(spec.Version)
	if followed(version) {
		n := b.number(id, version)
		if n == 0 {
			return ""
		}
		version = strconv.FormatInt(n, 10)
	}
	return id + " " + version
}

// number is that of a followed version, 0 when it is not known.
func (b *Backend) number(id, version string) int64 {
	if version == "$Latest" {
		return b.templates.numbers[id].value.latest
	}
	return b.templates.numbers[id].value.standard
}

// followed says whether a version is not a number, but what EC2 calls the
// latest or the default one now.
func followed(version string) bool { return version == "" || strings.HasPrefix(version, "$") }

// numbers are those of a launch template's versions.
type numbers struct{ standard, latest int64 }

// follow reads which versions the groups' launch templates are at now, many in
// a call.
func (b *Backend) follow(ctx context.Context, asgs []astypes.AutoScalingGroup) error {
	now, old := b.cfg.Now(), map[string]bool{}
	for _, asg := range asgs {
		if spec := templateOf(asg); spec != nil && followed(awssdk.ToString(spec.Version)) {
			id := awssdk.ToString(spec.LaunchTemplateId)
			known, ok := b.templates.numbers[id]
			old[id] = !ok || now.Sub(known.at) >= templatesEvery
		}
	}
	maps.DeleteFunc(old, func(_ string, is bool) bool { return !is })
	for part := range slices.Chunk(slices.Sorted(maps.Keys(old)), 200) {
		if err := b.followPart(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

func (b *Backend) followPart(ctx context.Context, ids []string) error {
	answer, err := b.cfg.EC2.DescribeLaunchTemplates(ctx, &ec2.DescribeLaunchTemplatesInput{LaunchTemplateIds: ids})
	if isCode(err, "InvalidLaunchTemplateId.NotFound") {
		// One that does not exist fails the call for all.
		if len(ids) == 1 {
			b.templates.numbers[ids[0]] = cached[numbers]{at: b.cfg.Now()}
			return nil
		}
		half := len(ids) / 2
		return errors.Join(b.followPart(ctx, ids[:half]), b.followPart(ctx, ids[half:]))
	}
	if err != nil {
		return fmt.Errorf("reading launch templates: %w", err)
	}
	for _, t := range answer.LaunchTemplates {
		b.templates.numbers[awssdk.ToString(t.LaunchTemplateId)] = cached[numbers]{
			numbers{awssdk.ToInt64(t.DefaultVersionNumber), awssdk.ToInt64(t.LatestVersionNumber)}, b.cfg.Now(),
		}
	}
	return nil
}

// version reads a version of a launch template. A numbered one never changes.
func (b *Backend) version(ctx context.Context, id, version string) (ec2types.ResponseLaunchTemplateData, error) {
	if followed(version) {
		n := b.number(id, version)
		if n == 0 {
			return ec2types.ResponseLaunchTemplateData{}, fmt.Errorf("launch template %q cannot be found", id)
		}
		version = strconv.FormatInt(n, 10)
	}
	key := id + " " + version
	if known, ok := b.templates.versions[key]; ok {
		return known, nil
	}
	answer, err := b.cfg.EC2.DescribeLaunchTemplateVersions(ctx, &ec2.DescribeLaunchTemplateVersionsInput{LaunchTemplateId: &id, Versions: []string{version}})
	if err != nil {
		return ec2types.ResponseLaunchTemplateData{}, fmt.Errorf("reading launch template %q, version %s: %w", id, version, err)
	}
	for _, v := range answer.LaunchTemplateVersions {
		if v.LaunchTemplateData != nil {
			b.templates.versions[key] = *v.LaunchTemplateData
			return *v.LaunchTemplateData, nil
		}
	}
	return ec2types.ResponseLaunchTemplateData{}, fmt.Errorf("launch template %q has no version %s", id, version)
}

func (b *Backend) typeInfo(ctx context.Context, name string) (ec2types.InstanceTypeInfo, error) {
	if info, ok := b.templates.types[name]; ok {
		return info, nil
	}
	answer, err := b.cfg.EC2.DescribeInstanceTypes(ctx, &ec2.DescribeInstanceTypesInput{InstanceTypes: []ec2types.InstanceType{ec2types.InstanceType(name)}})
	if err != nil {
		return ec2types.InstanceTypeInfo{}, fmt.Errorf("reading instance type %q: %w", name, err)
	}
	for _, info := range answer.InstanceTypes {
		b.templates.types[name] = info
		return info, nil
	}
	return ec2types.InstanceTypeInfo{}, fmt.Errorf("there is no instance type %q", name)
}

func (b *Backend) nodegroup(ctx context.Context, cluster, name string) (nodegroup, error) {
	key, now := cluster+" "+name, b.cfg.Now()
	known, ok := b.templates.nodegroups[key]
	if ok && now.Sub(known.at) < templatesEvery {
		return known.value, nil
	}
	answer, err := b.cfg.EKS.DescribeNodegroup(ctx, &eks.DescribeNodegroupInput{ClusterName: &cluster, NodegroupName: &name})
	if err != nil {
		return nodegroup{}, fmt.Errorf("reading managed node group %q of cluster %q: %w", name, cluster, err)
	}
	n := nodegroup{labels: map[string]string{}}
	if described := answer.Nodegroup; described != nil {
		maps.Copy(n.labels, described.Labels)
		if described.CapacityType != "" {
			n.labels["eks.amazonaws.com/capacityType"] = string(described.CapacityType)
		}
		for _, t := range described.Taints {
			effect := map[string]string{"NO_SCHEDULE": "NoSchedule", "NO_EXECUTE": "NoExecute", "PREFER_NO_SCHEDULE": "PreferNoSchedule"}[string(t.Effect)]
			n.taints = append(n.taints, model.Taint{Key: awssdk.ToString(t.Key), Value: awssdk.ToString(t.Value), Effect: effect})
		}
	}
	b.templates.nodegroups[key] = cached[nodegroup]{n, now}
	return n, nil
}
