"Folders and tables as people have them: each kind of folder and file with the classes, splits and labels that are right."
import os, unicodedata
from pathlib import Path
import pytest
from openpyxl import Workbook
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data.catalog import list_pending, list_rows, list_stored, open_catalog, record_results
from plant_mlops.data.catalog_files import add_folder, load_file

JPEG = b'\xff\xd8\xff\xe0' + b'\0' * 60 # enough to tell the format
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + b'\0' * 40
AVIF = b'\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf' + b'\0' * 40

@pytest.fixture
def engine(tmp_path):
    "An empty catalog."
    engine = open_catalog(settings(home=tmp_path/'home'))
    yield engine
    engine.dispose()

@pytest.fixture
def root(tmp_path):
    "An empty folder of photos."
    (tmp_path/'d').mkdir()
    return tmp_path/'d'

def put(root, *names, content=JPEG):
    for name in names:
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

def table_of(engine, *columns) -> list:
    return [tuple(row[column] for column in columns) for row in list_rows(engine)]

def names_of(engine) -> list:
    "Names of the files in the catalog, sorted."
    return sorted(Path(row['url_source']).name for row in list_rows(engine))

# -- Folders

@pytest.mark.parametrize('folders, expected', [
    (['train/fern', 'train/moss', 'valid/fern', 'test/moss'],
     {('fern', 'train'), ('moss', 'train'), ('fern', 'valid'), ('moss', 'test')}),
    (['Training/fern', 'Validation/fern', 'Testing/moss'], {('fern', 'train'), ('fern', 'valid'), ('moss', 'test')}),
    (['fern/train', 'fern/val', 'moss/train', 'moss/val'],
     {('fern', 'train'), ('fern', 'valid'), ('moss', 'train'), ('moss', 'valid')}),
    (['images/train/fern', 'images/test/moss'], {('fern', 'train'), ('moss', 'test')}),
    (['plants v2/train/fern', 'plants v2/val/moss'], {('fern', 'train'), ('moss', 'valid')}),
    (['train_set/fern', 'test_set/moss'], {('fern', 'train'), ('moss', 'test')}),
    (['train/fern', 'train/moss'], {('fern', None), ('moss', None)}),
    (['fern', 'moss', 'test'], {('fern', None), ('moss', None), ('test', None)}),
    (['images/fern', 'images/moss'], {('fern', None), ('moss', None)}),
    (['fern/2023/june', 'moss/2024'], {('fern', None), ('moss', None)})])
def test_classes_and_splits_are_read_from_folders(engine, root, folders, expected):
    put(root, *(f'{folder}/1.jpg' for folder in folders))
    add_folder(engine, root)
    assert set(table_of(engine, 'label', 'split')) == expected

def test_it_is_said_how_folders_were_read(engine, root):
    put(root, 'train/fern/2023/1.jpg', 'test/fern/2.jpg', 'extra/3.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert '1 test, 1 train' in notes and 'fern/2023' in notes

def test_photos_without_a_class_are_passed_over_and_named(engine, root):
    put(root, '0.jpg', 'fern/1.jpg')
    assert '1 photos (0.jpg)' in ' '.join(add_folder(engine, root).notes)
    assert names_of(engine) == ['1.jpg']

def test_photos_are_recognised_by_their_content(engine, root):
    put(root, *(f'fern/{name}' for name in ('1.jfif', '2.jpe', '3.pjpeg', '4', '5.txt', '6.JPG')))
    put(root, 'fern/7.heic', 'fern/8.jpg', content=HEIC)
    put(root, 'fern/9.avif', content=AVIF)
    put(root, 'fern/IMG_1.MOV', content=b'\0\0\0\x14ftypqt  \0\0\0\0qt  ')
    put(root, 'fern/IMG_1.AAE', 'fern/notes.jpg', content=b'<?xml version="1.0"?>')
    put(root, 'fern/empty.jpg', content=b'')
    notes = ' '.join(add_folder(engine, root).notes)
    assert names_of(engine) == ['1.jfif', '2.jpe', '3.pjpeg', '4', '5.txt', '6.JPG', '7.heic', '8.jpg', '9.avif']
    assert '1 .aae, 1 .jpg, 1 .mov, 1 empty' in notes

def test_folders_of_devices_are_passed_over(engine, root):
    system = ('@eaDir', '#recycle', '$RECYCLE.BIN', 'lost+found', 'System Volume Information', '.Trashes', '@Recycle')
    put(root, 'fern/1.jpg', *(f'{name}/2.jpg' for name in system), 'fern/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg')
    put(root, 'fern/Thumbs.db', 'fern/.DS_Store', 'fern/._1.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert table_of(engine, 'label') == [('fern',)]
    assert 'Files of the system' in notes

def test_labels_are_normalised_and_case_twins_are_named(engine, root):
    put(root, *(f'{unicodedata.normalize(form, "Löwenzahn")}/{form}.jpg' for form in ('NFC', 'NFD')))
    put(root, 'fern /1.jpg', 'fern/2.jpg', 'Fern/3.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert {label for label, in table_of(engine, 'label')} == {'L\u00f6wenzahn', 'fern', 'Fern'}
    assert "'Fern' and 'fern'" in notes

def test_a_linked_folder_is_read_once(engine, root, tmp_path):
    put(tmp_path, 'elsewhere/1.jpg')
    (root/'fern').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'elsewhere/again').symlink_to(root)
    assert add_folder(engine, root).new == 1

def test_unreadable_files_are_named(engine, root):
    put(root, 'fern/1.jpg')
    (root/'fern/2.jpg').symlink_to(root/'nowhere')
    assert 'fern/2.jpg could not be read' in ' '.join(add_folder(engine, root).notes)

def store_all(engine, sha256='a' * 64):
    record_results(engine, [dict(id=row['id'], status='stored', sha256=sha256) for row in list_pending(engine)])

def test_of_a_photo_in_two_places_the_newest_wins(engine, root):
    put(root, 'fern/1.jpg')
    add_folder(engine, root)
    store_all(engine)
    (root/'moss').mkdir()
    (root/'fern/1.jpg').rename(root/'moss/1.jpg')
    result = add_folder(engine, root)
    store_all(engine)
    assert (result.new, result.gone) == (1, 1)
    assert [row['label'] for row in list_stored(engine)] == ['fern', 'moss']
    (root/'moss/1.jpg').rename(root/'fern/1.jpg')
    assert add_folder(engine, root).gone == 1
    assert [row['label'] for row in list_stored(engine)][-1] == 'fern', 'it was moved back'

def test_the_rows_of_a_renamed_folder_are_said_to_have_no_file(engine, root):
    put(root, 'fern/1.jpg', 'moss/2.jpg')
    add_folder(engine, root)
    result = add_folder(engine, root.rename(root.parent/'e'))
    assert (result.new, result.gone, result.gone_elsewhere) == (2, 0, 2)
    assert [row['gone_at'] is None for row in list_rows(engine)] == [False, False, True, True]

def test_a_dry_run_changes_nothing(engine, root):
    put(root, 'fern/1.jpg', 'moss/2.jpg')
    add_folder(engine, root)
    (root/'fern/1.jpg').unlink()
    put(root, 'moss/3.jpg')
    before = list_rows(engine)
    result = add_folder(engine, root, mirror=True, dry_run=True)
    assert (result.new, result.gone) == (1, 1)
    assert list_rows(engine) == before

# -- Tables

URL = 'http://a.example/1.jpg'

def load(engine, tmp_path, content, name='table.csv', **options):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_file(engine, tmp_path/name, **options)

@pytest.mark.parametrize('content', [
    f'url_source, Label\n{URL}, fern \n', f'URL;Class\n{URL};fern\n;;\n;\n', f'sep=;\nurl;label\n{URL};fern\n',
    f'Image URL\tSpecies\n{URL}\tfern\n', f'label|url\nfern|{URL}\n', f'\ufeffurl_source,label\n{URL},fern\n',
    f'"url_source","label"\r\n"{URL}","fern"\r\n', f'\n\nurl_source,label\n\n{URL},fern\n\n',
    f'url_source,label,,,\n{URL},fern,,,\n', f'url_source;label\n{URL};fern\n'.encode('utf-16'),
    f'Plants of 2026\n\nurl_source,label\n{URL},fern\n'])
def test_tables_are_read_as_programs_write_them(engine, tmp_path, content):
    result = load(engine, tmp_path, content)
    assert (result.new, result.refused) == (1, [])
    assert table_of(engine, 'url_source', 'label') == [(URL, 'fern')]

def test_a_table_of_windows_is_read_and_said_so(engine, tmp_path):
    result = load(engine, tmp_path, f'url_source;label\n{URL};fougère\n'.encode('cp1252'))
    assert table_of(engine, 'label') == [('fougère',)]
    assert 'cp1252' in result.notes[0]

def test_another_encoding_can_be_named(engine, tmp_path):
    load(engine, tmp_path, f'url_source,label\n{URL},たんぽぽ\n'.encode('cp932'), encoding='cp932')
    assert table_of(engine, 'label') == [('たんぽぽ',)]

@pytest.mark.parametrize('name', ['table.xlsx', 'table.csv'])
def test_an_excel_file_is_read(engine, tmp_path, name):
    workbook = Workbook()
    workbook.active.append(['notes'])
    sheet = workbook.create_sheet()
    for row in (['Photo', 'Label', 'Split'], ['click', 'fern', 'Training'], [URL + '?2', 7, None]): sheet.append(row)
    sheet['A2'].hyperlink = URL
    sheet.append(['=HYPERLINK("http://a.example/3.jpg", "see")', 'moss', 'val'])
    workbook.save(tmp_path/'made.xlsx')
    result = load(engine, tmp_path, (tmp_path/'made.xlsx').read_bytes(), name)
    assert result.new == 3
    assert table_of(engine, 'url_source', 'label', 'split') == [
        (URL, 'fern', 'train'), (URL + '?2', '7', None), ('http://a.example/3.jpg', 'moss', 'valid')]

def test_a_table_without_labels_says_which_columns_it_has(engine, tmp_path):
    with pytest.raises(PlantError, match="'url_source', 'Etikett'"): load(engine, tmp_path, f'url_source,Etikett\n{URL},fern\n')
    with pytest.raises(PlantError, match="'Adresse', 'label'"): load(engine, tmp_path, f'Adresse,label\n{URL},fern\n')
    assert list_rows(engine) == []

def test_bad_rows_are_refused_with_their_number_and_the_others_loaded(engine, tmp_path):
    long_label = 'x' * 101
    rows = ['url_source,label', 'http://a.example/1.jpg,fern', 'ftp://a.example/2.jpg,fern', ',fern', 'http://[bad/1.jpg,fern',
            f'http://a.example/3.jpg,{long_label}', 'http://a.example/4.jpg,fern', 'http://a.example/4.jpg,moss']
    result = load(engine, tmp_path, '\n'.join(rows))
    assert table_of(engine, 'url_source') == [('http://a.example/1.jpg',)]
    assert sorted(row.place for row in result.refused) == [f'Row {n} (line {n + 1})' for n in range(2, 8)]

def test_long_urls_and_paths_of_any_script_are_loaded(engine, tmp_path):
    long_url = 'http://a.example/' + 'x' * 1600
    put(tmp_path, '写真/たんぽぽ.jpg')
    path = (tmp_path/'写真/たんぽぽ.jpg')
    load(engine, tmp_path, f'url_source,label\n{long_url},fern\n{path},fern\n{path.as_uri()}?,fern\n写真\\たんぽぽ.jpg,fern\n')
    assert [url for url, in table_of(engine, 'url_source')][:2] == [long_url, path.as_uri()]

@pytest.mark.parametrize('content, name, message', [
    (b'PK\x03\x04broken', 'a.xlsx', 'readable Excel'), (b'\xd0\xcf\x11\xe0\xa1\xb1', 'a.xls', 'cannot be loaded'),
    (b'\xd0\xcf\x11\xe0\xa1\xb1', 'a.csv', 'xlsx'), ('<html><table>', 'a.csv', 'web page'),
    (bytes(range(256)), 'a.csv', 'zero bytes')],
    ids=['broken xlsx', 'xls', 'xls as csv', 'html', 'binary'])
def test_files_that_are_no_tables_are_refused(engine, tmp_path, content, name, message):
    with pytest.raises(PlantError, match=message): load(engine, tmp_path, content, name)

def test_a_dry_run_of_a_table_or_a_script_adds_nothing(engine, tmp_path):
    assert load(engine, tmp_path, f'url_source,label\n{URL},fern\n', dry_run=True).new == 1
    assert load_file(engine, 'plants_data.sql', dry_run=True).new == 400
    assert list_rows(engine) == []
    with pytest.raises(PlantError, match='dry-run'): load(engine, tmp_path, 'DROP TABLE plants_data;\n', 'a.sql', dry_run=True)
    assert os.path.exists(tmp_path/'a.sql') and list_rows(engine) == []
