package awsfake

import (
	"encoding/json"
	"encoding/xml"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ec2 carries out a call of the EC2 API (version 2016-11-15).
func (c *Cloud) ec2(call Call) (any, error) {
	if call.Form.Get("DryRun") == "true" {
		// API_*: "If you have the required permissions, the error response is
		// DryRunOperation."
		return nil, &failure{412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set."}
	}
	switch call.Operation {
	case "DescribeInstances":
		return c.describeInstances(call)
	case "StartInstances", "StopInstances":
		return c.startStop(call)
	case "CreateTags":
		return c.createTags(call)
	case "DescribeLaunchTemplates":
		return c.describeLaunchTemplates(call)
	case "DescribeLaunchTemplateVersions":
		return c.describeLaunchTemplateVersions(call)
	case "DescribeSubnets":
		return c.describeSubnets(call)
	case "DescribeInstanceTypes":
		return c.describeInstanceTypes(call)
	case "GetInstanceTypesFromInstanceRequirements":
		return c.typesForRequirements(call)
	}
	return nil, &failure{400, "InvalidAction", "The action " + call.Operation + " is not valid"}
}

type xmlTag struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

type xmlInstance struct {
	ID    string `xml:"instanceId"`
	Type  string `xml:"instanceType"`
	State struct {
		Code int    `xml:"code"`
		Name string `xml:"name"`
	} `xml:"instanceState"`
	Zone      string   `xml:"placement>availabilityZone"`
	Launched  string   `xml:"launchTime"`
	Root      string   `xml:"rootDeviceType"`
	Lifecycle string   `xml:"instanceLifecycle,omitempty"`
	Tags      []xmlTag `xml:"tagSet>item"`
}

// stateCode is the number of an instance state (API_InstanceState).
func stateCode(name string) int {
	return map[string]int{"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}[name]
}

func (c *Cloud) describeInstances(call Call) (any, error) {
	reads := c.reads()
	ids := list(call.Form, "InstanceId")
	for _, id := range ids {
		if reads.instances[id] == nil {
			return nil, &failure{400, "InvalidInstanceID.NotFound", "The instance ID '" + id + "' does not exist"}
		}
	}
	for n := 1; call.Form.Has("Filter." + strconv.Itoa(n) + ".Name"); n++ {
		at := "Filter." + strconv.Itoa(n)
		if call.Form.Get(at+".Name") != "instance-id" {
			return nil, &failure{400, "InvalidParameterValue", "the fake knows the filter instance-id only"}
		}
		values := list(call.Form, at+".Value")
		if len(values) > 200 { // Using_Filtering: "up to 200 values"
			return nil, &failure{400, "FilterLimitExceeded", "The maximum number of filter values specified on a single call is 200"}
		}
		ids = append(ids, values...)
	}
	var found []*Instance
	for _, id := range ids {
		if i := reads.instances[id]; i != nil {
			found = append(found, i)
		}
	}
	most := 1000
	if n, err := strconv.Atoi(call.Form.Get("MaxResults")); err == nil {
		most = n
	}
	found, next, err := page(found, call.Form.Get("NextToken"), most, max(c.pages, 5))
	if err != nil {
		return nil, err
	}
	type reservation struct {
		Instances []xmlInstance `xml:"instancesSet>item"`
	}
	answer := struct {
		XMLName      xml.Name      `xml:"reservationSet"`
		Reservations []reservation `xml:"item"`
	}{}
	for _, i := range found {
		x := xmlInstance{ID: i.ID, Type: i.Type, Zone: i.Zone, Launched: stamp(i.LaunchedAt), Root: "ebs"}
		x.State.Name, x.State.Code = i.State, stateCode(i.State)
		if i.InstanceStore {
			x.Root = "instance-store"
		}
		if i.Spot {
			x.Lifecycle = "spot"
		}
		for _, k := range slices.Sorted(maps.Keys(i.Tags)) {
			x.Tags = append(x.Tags, xmlTag{k, i.Tags[k]})
		}
		answer.Reservations = append(answer.Reservations, reservation{[]xmlInstance{x}})
	}
	return paged(answer, next), nil
}

// paged adds a token to an answer.
func paged(answer any, next string) any {
	if next == "" {
		return answer
	}
	return []any{answer, struct {
		XMLName xml.Name `xml:"nextToken"`
		Token   string   `xml:",chardata"`
	}{Token: next}}
}

// startStop: API_StartInstances and API_StopInstances. Both succeed for an
// instance that is on its way already; starting one that is stopping is an
// IncorrectInstanceState, a spot instance cannot be stopped (here: none is of
// a persistent request).
func (c *Cloud) startStop(call Call) (any, error) {
	start := call.Operation == "StartInstances"
	var found []*Instance
	for _, id := range list(call.Form, "InstanceId") {
		i := c.instances[id]
		switch {
		case i == nil:
			return nil, &failure{400, "InvalidInstanceID.NotFound", "The instance ID '" + id + "' does not exist"}
		case i.State == "shutting-down" || i.State == "terminated" || start && i.State == "stopping" || !start && i.State == "pending":
			return nil, &failure{400, "IncorrectInstanceState", "The instance '" + id + "' is not in a state from which it can be started or stopped."}
		case start && i.NoCapacity && i.State == "stopped":
			return nil, &failure{500, "InsufficientInstanceCapacity", "Insufficient capacity."}
		case !start && (i.Spot || i.InstanceStore):
			return nil, &failure{400, "UnsupportedOperation", "You can't stop the instance '" + id + "'"}
		case !start && i.StopProtected:
			return nil, &failure{400, "OperationNotPermitted", "The instance '" + id + "' may not be stopped. Modify its 'disableApiStop' instance attribute and try again."}
		}
		found = append(found, i)
	}
	for _, i := range found {
		switch {
		case start && i.State == "stopped":
			i.State, i.due, i.LaunchedAt = "pending", c.now.Add(c.timing.Start), c.now
		case !start && i.State == "running":
			i.State, i.due = "stopping", c.now.Add(c.timing.Stop)
		}
	}
	return struct {
		XMLName xml.Name `xml:"instancesSet"`
	}{}, nil
}

func (c *Cloud) createTags(call Call) (any, error) {
	for _, id := range list(call.Form, "ResourceId") {
		i := c.instances[id]
		if i == nil {
			return nil, &failure{400, "InvalidInstanceID.NotFound", "The instance ID '" + id + "' does not exist"}
		}
		i.Tags = maps.Clone(i.Tags)
		for n := 1; call.Form.Has("Tag." + strconv.Itoa(n) + ".Key"); n++ {
			i.Tags[call.Form.Get("Tag."+strconv.Itoa(n)+".Key")] = call.Form.Get("Tag." + strconv.Itoa(n) + ".Value")
		}
	}
	return struct {
		XMLName xml.Name `xml:"return"`
		Value   bool     `xml:",chardata"`
	}{Value: true}, nil
}

func (c *Cloud) describeLaunchTemplates(call Call) (any, error) {
	type item struct {
		ID      string `xml:"launchTemplateId"`
		Name    string `xml:"launchTemplateName"`
		Default int    `xml:"defaultVersionNumber"`
		Latest  int    `xml:"latestVersionNumber"`
	}
	answer := struct {
		XMLName xml.Name `xml:"launchTemplates"`
		Items   []item   `xml:"item"`
	}{}
	ids := list(call.Form, "LaunchTemplateId")
	for n := 1; call.Form.Has("Filter." + strconv.Itoa(n) + ".Name"); n++ {
		return nil, &failure{400, "InvalidParameterValue", "the fake knows no filters here"}
	}
	for _, id := range ids {
		t := c.templates[id]
		if t == nil || t.Deleted {
			return nil, &failure{400, "InvalidLaunchTemplateId.NotFound", "The specified launch template, with template ID " + id + ", does not exist."}
		}
		answer.Items = append(answer.Items, item{t.ID, t.Name, t.number("$Default"), len(t.Versions)})
	}
	return answer, nil
}

func (c *Cloud) describeLaunchTemplateVersions(call Call) (any, error) {
	type device struct {
		Name string `xml:"deviceName"`
		GiB  int    `xml:"ebs>volumeSize"`
	}
	type item struct {
		ID      string   `xml:"launchTemplateId"`
		Version int      `xml:"versionNumber"`
		Type    string   `xml:"launchTemplateData>instanceType,omitempty"`
		Image   string   `xml:"launchTemplateData>imageId,omitempty"`
		Devices []device `xml:"launchTemplateData>blockDeviceMappingSet>item"`
	}
	id := call.Form.Get("LaunchTemplateId")
	t := c.templates[id]
	if t == nil || t.Deleted {
		return nil, &failure{400, "InvalidLaunchTemplateId.NotFound", "The specified launch template, with template ID " + id + ", does not exist."}
	}
	answer := struct {
		XMLName xml.Name `xml:"launchTemplateVersionSet"`
		Items   []item   `xml:"item"`
	}{}
	for _, v := range list(call.Form, "LaunchTemplateVersion") {
		n := t.number(v)
		if n < 1 || n > len(t.Versions) {
			return nil, &failure{400, "InvalidLaunchTemplateId.VersionNotFound", "Could not find the specified version " + v}
		}
		data := t.Versions[n-1]
		x := item{ID: id, Version: n, Type: data.InstanceType, Image: data.Image}
		if data.VolumeGiB > 0 {
			x.Devices = []device{{"/dev/xvda", data.VolumeGiB}}
		}
		answer.Items = append(answer.Items, x)
	}
	return answer, nil
}

// describeSubnets: API_DescribeSubnets; one id that does not exist fails the call.
func (c *Cloud) describeSubnets(call Call) (any, error) {
	type item struct {
		ID   string `xml:"subnetId"`
		Free int    `xml:"availableIpAddressCount"`
	}
	answer := struct {
		XMLName xml.Name `xml:"subnetSet"`
		Items   []item   `xml:"item"`
	}{}
	for _, id := range list(call.Form, "SubnetId") {
		free, ok := c.subnets[id]
		if !ok {
			return nil, &failure{400, "InvalidSubnetID.NotFound", "The subnet ID '" + id + "' does not exist"}
		}
		answer.Items = append(answer.Items, item{id, free})
	}
	return answer, nil
}

func (c *Cloud) describeInstanceTypes(call Call) (any, error) {
	type gpu struct {
		Count int    `xml:"count"`
		Maker string `xml:"manufacturer"`
	}
	type item struct {
		Name  string   `xml:"instanceType"`
		CPUs  int      `xml:"vCpuInfo>defaultVCpus"`
		MiB   int      `xml:"memoryInfo>sizeInMiB"`
		Archs []string `xml:"processorInfo>supportedArchitectures>item"`
		GPUs  []gpu    `xml:"gpuInfo>gpus>item"`
		Store bool     `xml:"instanceStorageSupported"`
		ENIs  int      `xml:"networkInfo>maximumNetworkInterfaces"`
		IPs   int      `xml:"networkInfo>ipv4AddressesPerInterface"`
	}
	answer := struct {
		XMLName xml.Name `xml:"instanceTypeSet"`
		Items   []item   `xml:"item"`
	}{}
	names := list(call.Form, "InstanceType")
	if len(names) > 100 {
		return nil, &failure{400, "InvalidParameterValue", "at most 100 instance types"}
	}
	for _, name := range names {
		t, ok := c.types[name]
		if !ok {
			return nil, &failure{400, "InvalidInstanceType", "The following supplied instance types do not exist: [" + name + "]"}
		}
		x := item{Name: t.Name, CPUs: t.VCPUs, MiB: t.MiB, Archs: strings.Split(t.Arch, ","), ENIs: t.Interfaces, IPs: t.Address, Store: t.Storage}
		if t.GPUs > 0 {
			x.GPUs = []gpu{{t.GPUs, "NVIDIA"}}
		}
		answer.Items = append(answer.Items, x)
	}
	return answer, nil
}

func (c *Cloud) typesForRequirements(call Call) (any, error) {
	least := func(what string) int {
		n, _ := strconv.Atoi(call.Form.Get("InstanceRequirements." + what + ".Min"))
		return n
	}
	type item struct {
		Name string `xml:"instanceType"`
	}
	answer := struct {
		XMLName xml.Name `xml:"instanceTypeSet"`
		Items   []item   `xml:"item"`
	}{}
	for _, name := range slices.Sorted(maps.Keys(c.types)) {
		if c.types[name].VCPUs < least("VCpuCount") || c.types[name].MiB < least("MemoryMiB") {
			continue
		}
		answer.Items = append(answer.Items, item{name})
	}
	return answer, nil
}

// eksPath takes /clusters/{cluster}/node-groups/{name} apart.
func eksPath(path string) (cluster, name string, ok bool) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if len(parts) != 4 || parts[0] != "clusters" || parts[2] != "node-groups" {
		return "", "", false
	}
	return parts[1], parts[3], true
}

// describeNodegroup: API_DescribeNodegroup of EKS.
func (c *Cloud) describeNodegroup(cluster, name string) ([]byte, error) {
	n, ok := c.nodegroups[cluster+"/"+name]
	if !ok {
		return nil, &failure{404, "ResourceNotFoundException", "No node group found for name: " + name + "."}
	}
	type taint struct {
		Key    string `json:"key"`
		Value  string `json:"value,omitempty"`
		Effect string `json:"effect"`
	}
	var taints []taint
	for _, t := range n.Taints {
		taints = append(taints, taint{t[0], t[1], t[2]})
	}
	return json.Marshal(map[string]any{"nodegroup": map[string]any{
		"clusterName": cluster, "nodegroupName": name, "labels": n.Labels, "taints": taints,
		"capacityType": n.CapacityType, "createdAt": float64(time.Unix(0, 0).Unix()),
	}})
}
