package aws

import (
	"strings"
	"testing"
	"time"

	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

func TestPrices(t *testing.T) {
	list := listedPrices()
	if _, err := time.Parse(time.DateOnly, list.asOf); err != nil {
		t.Errorf("the list has no date: %v", err)
	}
	if rows := strings.Count(priceList, "\n") - 1; len(list.dollars) != rows || rows < 1000 {
		t.Errorf("%d prices of %d rows", len(list.dollars), rows)
	}
	small := ec2types.InstanceTypeInfo{VCpuInfo: &ec2types.VCpuInfo{DefaultVCpus: new(int32(2))}, MemoryInfo: &ec2types.MemoryInfo{SizeInMiB: new(int64(8192))}}
	for _, tc := range []struct {
		region, instanceType string
		info                 ec2types.InstanceTypeInfo
		dollars              float64
		assumed              string
	}{
		{"us-east-1", "m6i.large", small, 0.096, ""},
		{"us-gov-west-1", "m6i.large", small, 0.121, ""},
		{"eu-central-1", "m6i.large", small, 0.096, "the list price of m6i.large in eu-central-1 is not known: $0.0960 an hour is assumed from us-east-1"},
		{"us-east-1", "m99.large", small, 0.0964, "the list price of m99.large is not known: $0.0964 an hour is assumed from its CPUs and memory"},
		{"us-east-1", "m99.large", ec2types.InstanceTypeInfo{}, 0, "the list price of m99.large is not known, and none is estimated"},
	} {
		dollars, assumed, ok := list.price(tc.region, tc.instanceType, tc.info)
		if diff := dollars - tc.dollars; diff > 1e-6 || diff < -1e-6 || assumed != tc.assumed || ok != (tc.dollars > 0) {
			t.Errorf("%s in %s: %g, %q, %v; want %g, %q", tc.instanceType, tc.region, dollars, assumed, ok, tc.dollars, tc.assumed)
		}
	}
}

// TestEstimate: an estimate is near the list price of the types that runners
// are mostly made of.
func TestEstimate(t *testing.T) {
	list := listedPrices()
	for family, perCPU := range map[string]int64{"m6i": 4, "c6i": 2, "r6i": 8, "m7i": 4, "c7i": 2, "r7i": 8, "m7a": 4, "m8i": 4} {
		for size, cpus := range map[string]int32{"large": 2, "2xlarge": 8, "8xlarge": 32} {
			info := ec2types.InstanceTypeInfo{VCpuInfo: &ec2types.VCpuInfo{DefaultVCpus: &cpus}, MemoryInfo: &ec2types.MemoryInfo{SizeInMiB: new(int64(cpus) * perCPU * 1024)}}
			listed := list.dollars[priced{homeRegion, family + "." + size}]
			guess, ok := estimate(info)
			if ratio := guess / listed; !ok || ratio < 0.8 || ratio > 1.25 {
				t.Errorf("%s.%s is estimated at %g, listed at %g", family, size, guess, listed)
			}
		}
	}
}
