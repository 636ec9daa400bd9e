package enginetest

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
)

// A cache is a folder with one file a key, of the size that the key's jobs left
// there. The files are sparse: gigabytes cost nothing.

func cacheOf(dir string) string { return filepath.Join(dir, "cache") }

func fileOf(dir, key string) string {
	return filepath.Join(cacheOf(dir), "key-"+url.PathEscape(key))
}

// use makes sure that the cache has so many bytes of a key, and says whether it
// had any before.
func (s store) use(key string, bytes int64) (warm bool, err error) {
	name := fileOf(s.dir, key)
	info, err := os.Stat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("looking for the cache of %q: %w", key, err)
	}
	if err == nil && info.Size() >= bytes {
		return true, nil
	}
	warm = err == nil
	file, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return false, fmt.Errorf("writing the cache of %q: %w", key, err)
	}
	defer file.Close()
	if err := file.Truncate(bytes); err != nil {
		return false, fmt.Errorf("writing the cache of %q: %w", key, err)
	}
	return warm, nil
}

// count returns how many keys and bytes the cache has.
func (s store) count() (entries int, bytes int64, err error) {
	files, err := os.ReadDir(cacheOf(s.dir))
	if err != nil {
		return 0, 0, fmt.Errorf("counting the cache: %w", err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			return 0, 0, fmt.Errorf("counting the cache: %w", err)
		}
		bytes += info.Size()
	}
	return len(files), bytes, nil
}

// Bytes returns what the data folder dir holds of a key, whether an engine runs on
// it or not: what a test compares before and after. It is 0 when there is none.
func Bytes(dir, key string) int64 {
	info, err := os.Stat(fileOf(dir, key))
	if err != nil {
		return 0
	}
	return info.Size()
}

// Wipe erases the cache in the data folder dir, as real engines have done even
// after a clean stop (https://github.com/dagger/dagger/issues/13952).
func Wipe(dir string) error {
	if err := os.RemoveAll(cacheOf(dir)); err != nil {
		return fmt.Errorf("erasing the cache: %w", err)
	}
	return nil
}
